// The page of `explore`. Everything that comes from the model or the user becomes text, never markup.

import { linesByDepth, planePath } from "./charts.js";

const find = (id) => document.getElementById(id);
let seen = null;  // the last answer of the server

function make(name, { text = null, style = "", ...attributes } = {}) {
  const made = document.createElement(name);
  if (text !== null) made.textContent = text;
  if (style) made.className = style;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function say(text) {
  find("message").textContent = text;
  find("message").hidden = !text;
}

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("the server does not answer: it may have ended.");
  }
  const content = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(content.error ?? `the server answers with status ${response.status}.`);
  return content;
}

const percent = (p) => (p === null ? "not a number" : `${(100 * p).toFixed(p > 0.9995 || p < 0.0995 ? 2 : 1)} %`);

function token(text, probability, marks = []) {
  const made = make("span", { text, style: "token", title: `probability ${percent(probability)}` });
  made.style.setProperty("--p", probability ?? 0);
  made.classList.toggle("sure", (probability ?? 0) > 0.55);
  if (marks.length) {
    const names = marks.map(({ name }) => name).join(", ");
    made.append(make("sup", { text: marks.map(letterOf).join(""), title: `exits that stop here: ${names}` }));
  }
  return made;
}

function verdict(text) {
  const shown = text.trim() || "(empty)";
  if (seen.expected === null) return make("span", { text: shown });
  const isRight = text === seen.expected;
  return make("span", { text: `${isRight ? "✓" : "✗"} ${shown}`, style: isRight ? "right" : "wrong" });
}

const letterOf = (exit) => exit.name[0].toUpperCase();
const deepest = () => seen.depths[seen.depths.length - 1];

/** Exits that stop a token at a depth, or between it and the depth shown before; at the deepest no rule is needed. */
function stopsAt(row, place) {
  const after = row === 0 ? -1 : seen.depths[row - 1];
  return seen.exits.filter(({ loops }) =>
    loops[place] > after && loops[place] <= seen.depths[row] && loops[place] < deepest());
}

function drawGrid() {
  const rows = seen.depths.map((depth, row) => {
    const answer = seen.answers[seen.chosen[row]];
    const line = make("tr");
    const cells = make("td", { style: "row-tokens" });
    answer.tokens.forEach((text, place) => cells.append(token(text, answer.probability[row][place], stopsAt(row, place))));
    const last = make("td");
    last.append(verdict(answer.text));
    line.append(make("td", { text: depth }), cells, last);
    line.addEventListener("click", () => choose(row));
    return line;
  });
  // In words the answer is its tokens: a column of its own would only take their place.
  find("grid").classList.toggle("in-words", seen.expected === null);
  find("grid").tBodies[0].replaceChildren(...rows);
}

function drawExits() {
  const rows = seen.exits.map((exit) => {
    const line = make("tr"), loops = make("td"), answer = make("td");
    exit.tokens.forEach((text, place) => {
      const number = exit.loops[place], isDeepest = number === deepest();
      loops.append(make("span", { text, style: "token" }));
      loops.append(make("span", { text: isDeepest ? `${number}, all ` : `${number} `, style: "loops" }));
    });
    answer.append(verdict(exit.text));
    const name = make("th", { text: exit.name, scope: "row" });
    line.append(name, make("td", { text: exit.when }), make("td", { text: exit.mean_loops.toFixed(1), style: "number" }));
    line.append(loops, answer);
    return line;
  });
  find("exits").tBodies[0].replaceChildren(...rows);
  const names = seen.exits.map((exit) => `${letterOf(exit)} ${exit.name}`).join(", ");
  find("exit-key").textContent = ` · where an exit stops a token: ${names}`;
}

function choose(row) {
  const depth = seen.depths[row], answer = seen.answers[seen.chosen[row]];
  find("depth").value = row;
  find("depth").setAttribute("aria-valuetext", `depth ${depth}`);
  find("depth-shown").textContent = depth;
  find("tokens").replaceChildren(...answer.tokens.map((text, place) => token(text, answer.probability[row][place])));
  find("verdict").replaceChildren(verdict(answer.text));
  if (seen.expected !== null && answer.text !== seen.expected) {
    find("verdict").append(make("span", { text: `  right is ${seen.expected}`, style: "quiet" }));
  }
  [...find("grid").tBodies[0].rows].forEach((line, at) => line.classList.toggle("now", at === row));
  // An exit that stops no token has no place among the depths.
  const marks = seen.exits.filter((exit) => exit.mean_loops < deepest())
    .map((exit) => ({ depth: exit.mean_loops, letter: letterOf(exit) }));
  const common = { depths: seen.depths, index: row, onPick: choose };
  find("residual").replaceChildren(linesByDepth({
    ...common, rows: answer.residual, logarithmic: true, marks, label: "residual by depth",
  }));
  find("entropy").replaceChildren(linesByDepth({
    ...common, rows: answer.entropy, logarithmic: false, marks, label: "entropy by depth",
  }));
  const share = answer.explained.reduce((sum, part) => sum + (part ?? 0), 0);
  find("path-caption").textContent =
    `path of the latent state, numbers are depths; its plane holds ${(100 * share).toFixed(0)} % of the variance`;
  find("path").replaceChildren(planePath({ ...common, points: answer.path, label: "path of the latent state" }));
}

async function submit(event) {
  event.preventDefault();
  say("");
  find("problem").value ||= find("problem").placeholder;  // the example
  find("go").disabled = true;
  find("go").textContent = "Computing…";
  try {
    seen = await ask("api/answer", { problem: find("problem").value, max_depth: Number(find("greatest").value) });
    find("prompt").textContent = seen.prompt.join("");
    find("depth").max = seen.depths.length - 1;
    drawGrid();
    drawExits();
    find("result").hidden = false;
    choose(seen.depths.length - 1);
  } catch (error) {
    find("result").hidden = true;
    say(error.message);
  } finally {
    find("go").disabled = false;
    find("go").textContent = "Answer";
  }
}

find("ask").addEventListener("submit", submit);
find("depth").addEventListener("input", () => choose(Number(find("depth").value)));
find("problem").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    find("ask").requestSubmit();
  }
});

try {
  const model = await ask("api/model");
  document.title = `looplm explore: ${model.name}`;
  find("name").textContent = model.name;
  find("about").textContent = model.about;
  find("problem").placeholder = model.example;
  find("problem").maxLength = model.max_characters;
  find("greatest").max = model.max_depth;
  find("greatest").value = Math.min(16, model.max_depth);
  find("problem").focus();
} catch (error) {
  say(error.message);
}
