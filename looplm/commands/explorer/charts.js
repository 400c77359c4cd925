// Charts as SVG: numbers in, elements out. Knows nothing of the page. Text only ever becomes text nodes.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 560, HEIGHT = 190, LEFT = 52, RIGHT = 12, TOP = 12, BOTTOM = 24;

export function element(name, attributes = {}, text = null) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

const finite = (value) => typeof value === "number" && Number.isFinite(value);

/** Places of depths along an axis: even up to 32 loops, else by the logarithm, so that the first loops can be seen. */
function depthScale(depths) {
  const last = depths[depths.length - 1];
  const place = last <= 32 ? (d) => d : (d) => Math.log2(1 + d);
  return (depth) => LEFT + (WIDTH - LEFT - RIGHT) * place(depth) / place(last);
}

function depthTicks(last) {
  if (last <= 32) {
    const step = [1, 2, 4, 8].find((size) => last / size <= 8);
    return Array.from({ length: Math.floor(last / step) + 1 }, (_, index) => index * step);
  }
  const powers = [0, 1];
  while (powers[powers.length - 1] * 2 <= last) powers.push(powers[powers.length - 1] * 2);
  return powers;
}

const shown = (value) => (value !== 0 && (Math.abs(value) < 0.01 || Math.abs(value) >= 1e4)
  ? value.toExponential(0) : String(Number(value.toPrecision(2))));

function valueScale(values, logarithmic) {
  const known = values.filter((value) => finite(value) && (!logarithmic || value > 0));
  let least = Math.min(...known), greatest = Math.max(...known);
  if (!known.length) [least, greatest] = logarithmic ? [0.1, 1] : [0, 1];
  const height = HEIGHT - TOP - BOTTOM;
  if (logarithmic) {
    let low = Math.floor(Math.log10(least)), high = Math.ceil(Math.log10(greatest));
    if (low === high) high += 1;
    const step = Math.ceil((high - low) / 5);
    const ticks = [];
    for (let power = low; power <= high; power += step) ticks.push(10 ** power);
    // What is not positive, such as a state that no longer moves at all, lies on the floor.
    const place = (value) => (value > 0 ? Math.log10(value) : low);
    return { ticks, y: (value) => TOP + height * (high - place(value)) / (high - low) };
  }
  const high = greatest > 0 ? greatest * 1.05 : 1;
  const power = 10 ** Math.floor(Math.log10(high));
  const step = power * [0.2, 0.5, 1, 2, 5].find((size) => high / (size * power) <= 5);
  const ticks = Array.from({ length: Math.floor(high / step) + 1 }, (_, index) => index * step);
  return { ticks, y: (value) => TOP + height * (1 - value / high) };
}

function pathOf(points) {
  // A gap where a value is not finite.
  let open = false;
  return points.map(([x, y]) => {
    if (!finite(x) || !finite(y)) { open = false; return ""; }
    const command = open ? "L" : "M";
    open = true;
    return `${command}${x.toFixed(1)} ${y.toFixed(1)}`;
  }).join("");
}

function frame(label) {
  return element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
}

/**
 * Lines by depth: one thin line a token, one bold line for their mean, a cursor at the chosen depth.
 * rows: for each depth the values of the tokens; marks: [{depth, letter}].
 */
export function linesByDepth({ depths, rows, index, logarithmic, marks, label, onPick }) {
  const svg = frame(label), x = depthScale(depths), bottom = HEIGHT - BOTTOM;
  const { ticks, y } = valueScale(rows.flat(), logarithmic);
  for (const tick of ticks) {
    svg.append(element("line", { class: "tick", x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick) }));
    svg.append(element("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, shown(tick)));
  }
  for (const tick of depthTicks(depths[depths.length - 1])) {
    svg.append(element("text", { x: x(tick), y: bottom + 15, "text-anchor": "middle" }, String(tick)));
  }
  svg.append(element("path", { class: "axis", d: `M${LEFT} ${TOP}V${bottom}H${WIDTH - RIGHT}` }));
  const draw = (values, style) =>
    svg.append(element("path", { class: style, d: pathOf(values.map((v, i) => [x(depths[i]), finite(v) ? y(v) : v])) }));
  for (let token = 0; token < rows[0].length; token += 1) draw(rows.map((row) => row[token]), "thin");
  const means = rows.map((row) => (row.every(finite) ? row.reduce((a, b) => a + b, 0) / row.length : null));
  draw(means, "bold");
  svg.append(element("line", { class: "now", x1: x(depths[index]), x2: x(depths[index]), y1: TOP, y2: bottom }));
  if (finite(means[index])) {
    svg.append(element("circle", { class: "here", cx: x(depths[index]), cy: y(means[index]), r: 4 }));
  }
  const standing = [];
  for (const { depth, letter } of marks) {
    // One above the other where they would cover one another.
    const below = standing.filter((other) => Math.abs(other - x(depth)) < 10).length;
    standing.push(x(depth));
    svg.append(element("text", { class: "exit", x: x(depth), y: bottom - 3 - 12 * below }, letter));
  }
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) * WIDTH / box.width;
    const far = depths.map((depth) => Math.abs(x(depth) - at));
    onPick(far.indexOf(Math.min(...far)));
  });
  return svg;
}

/** The path of a state in a plane: solid up to the chosen depth, dashed beyond. */
export function planePath({ points, depths, index, label }) {
  const svg = frame(label);
  const known = points.filter(([a, b]) => finite(a) && finite(b));
  if (!known.length) return svg;
  const [xs, ys] = [known.map(([a]) => a), known.map(([, b]) => b)];
  const middle = (values) => (Math.min(...values) + Math.max(...values)) / 2;
  const span = (values) => Math.max(...values) - Math.min(...values);
  const pad = 16;
  // One scale for both components: angles and distances are true.
  const scale = Math.min((WIDTH - 2 * pad) / (span(xs) || 1), (HEIGHT - 2 * pad) / (span(ys) || 1));
  const place = ([a, b]) => (finite(a) && finite(b)
    ? [WIDTH / 2 + (a - middle(xs)) * scale, HEIGHT / 2 - (b - middle(ys)) * scale] : [a, b]);
  const placed = points.map(place);
  svg.append(element("path", { class: "bold", d: pathOf(placed.slice(0, index + 1)) }));
  svg.append(element("path", { class: "thin ahead", d: pathOf(placed.slice(index)) }));
  placed.forEach(([cx, cy], at) => {
    if (!finite(cx)) return;
    const style = at === index ? "here" : at < index ? "dot" : "dot ahead";
    svg.append(element("circle", { class: style, cx, cy, r: at === index ? 6 : 2.5 }));
  });
  // Depths get their number where it does not stand on another one.
  const labelled = [];
  placed.forEach(([cx, cy], at) => {
    if (!finite(cx) || labelled.some(([a, b]) => Math.hypot(a - cx, b - cy) < 22)) return;
    labelled.push([cx, cy]);
    const anchor = cx > WIDTH - 40 ? "end" : "start";
    svg.append(element("text", { x: cx + (anchor === "end" ? -7 : 7), y: cy - 6, "text-anchor": anchor }, String(depths[at])));
  });
  return svg;
}
