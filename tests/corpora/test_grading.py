"""Answers are found where models put them, and judged by what they are worth."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm.corpora.exact_numbers import read_number
from looplm.corpora.extraction import extract_answer
from looplm.corpora.grading import Grade, Grader
from looplm.corpora.symbolic import SymbolicComparer


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(cpu_seconds=2) as grader:
        yield grader


@pytest.mark.parametrize(
    ("text", "answer", "rule"),
    [
        ("2 + 2 = 4\n#### 4", "4", "hashes"),
        ("#### 4\n\nNext one: 1 + 1\n#### 2", "4", "hashes"),
        ("#### Step 1\nAdd.\n#### Step 2\nThe answer is 7.", "7", "phrase"),
        ("#### Evelyn", "Evelyn", "hashes"),
        ("#### Step\nso \\boxed{9}", "9", "boxed"),
        (r"first \boxed{1}, then \boxed{\frac{a}{b^{2}}} and more text", r"\frac{a}{b^{2}}", "boxed"),
        (r"\boxed{\boxed{5}}", "5", "boxed"),
        (r"\boxed{5} and then \boxed{6", "5", "boxed"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}", "boxed"),
        (r"\boxed 7 .", "7", "boxed"),
        ("The answer is 5. The answer is 5. The answer is 5.", "5", "phrase"),
        ("The answer is $18 because 3 * 6 = 18.", "$18", "phrase"),
        ("So the final answer is $x+1$. I hope it is correct.", "x+1", "phrase"),
        ("The answer is that they need 4 days.", "4", "phrase"),
        ("The answer is 3.5.", "3.5", "phrase"),
        ("The answer is 2**3", "2**3", "phrase"),
        ("Answer: 3\n\nQuestion: 2 + 2?\nAnswer: 4", "3", "phrase"),
        ("She has 3 of 1,200 shells (10 - 4).", "4", "last_number"),
        ("It costs -$5.50", "-$5.50", "last_number"),
        ("That makes ７２", "72", "last_number"),
    ],
)
def test_answer_is_found_where_it_stands(text: str, answer: str, rule: str) -> None:
    found = extract_answer(text)
    assert found is not None
    assert (found.text, found.rule) == (answer, rule)


@pytest.mark.parametrize("text", ["", "I do not know.", "####", r"\boxed{}", "\0", "The answer is"])
def test_text_without_an_answer_is_unparsable(text: str, grader: Grader) -> None:
    assert grader.grade(text, "5") == Grade("unparsable")


RIGHT = [
    ("0.5", "1/2"),
    ("72", "72.0"),
    ("72", "72%"),
    ("0.72", "72%"),
    ("3/4", "0.75"),
    ("1000", "1,000"),
    ("18", "$18"),
    ("18", r"\$18.00"),
    ("18", "18 dollars."),
    ("-5", "−5"),
    ("125", "１２５"),
    ("1.5", "1½"),
    ("2500000", "2.5 million"),
    (r"1\frac{4}{5}", "1.8"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    (r"90^\circ", "90"),
    (r"\frac{270}7\text{ degrees}", "270/7"),
    ("5", "x = 5"),
    ("x=5", "5"),
    ("7", "3 + 4 = 7"),
    ("1,-2", "-2, 1"),
    ("(3, 4]", r"\left(3,\frac{8}{2}\right]"),
    (r"\text{Evelyn}", "evelyn"),
    (r"\text{(C)}", "C"),
    ("52_8", "52_{8}"),
    ("2k+2", "2(k + 1)"),
    (r"\frac{\sqrt{3}}{3}", "1/sqrt(3)"),
    (r"3 \pm 2 \sqrt{2}", r"3-2\sqrt{2}, 3+2\sqrt{2}"),
    (r"\begin{pmatrix} -1/3 \\ 2 \end{pmatrix}", r"\begin{pmatrix} -\frac13 \\ 2 \end{pmatrix}"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty) \cup (-\infty,2)"),
]
WRONG = [
    ("5", "-5"),
    ("72%", "7200%"),
    ("5000000", "5 thousand"),
    ("72", "72x"),
    ("72", "72.001"),
    ("72", "7 2"),
    ("10", "1,0"),
    ("5", "5 or 6"),
    ("52", "5²"),
    ("999", "9**9"),
    ("1/3", "0.33"),
    ("(3,4]", "(3,4)"),
    ("(3,4)", "[3,4]"),
    ("(3,4)", "(4,3)"),
    ("(3,4)", r"\{3,4\}"),
    ("1,-2", "(1,-2)"),
    ("1,2", "1,2,3"),
    ("52_8", "52"),
    ("x=5", "y=5"),
    (r"\text{east}", "tase"),
    (r"\text{(C)}", "B"),
    ("p - q", "q - p"),
    (r"\sqrt{51}", "51"),
]


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_equal_answer_is_right_however_it_is_written(gold: str, answer: str, grader: Grader) -> None:
    assert grader.compare(answer, gold)[0] == "right"


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_other_answer_is_not_right(gold: str, answer: str, grader: Grader) -> None:
    assert grader.compare(answer, gold)[0] == "wrong"


@given(st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=1000))
def test_every_fraction_is_read_back_exactly(value: Fraction) -> None:
    sign, over, under = "-" if value < 0 else "", abs(value.numerator), value.denominator
    whole, rest = divmod(over, under)
    for text in (str(value), f"{sign}\\frac{{{over}}}{{{under}}}", f"{sign}{whole} \\frac{{{rest}}}{{{under}}}"):
        number = read_number(text)
        assert number is not None
        assert number.face == value


@given(st.integers(-(10**12), 10**12))
def test_every_integer_is_read_back_with_commas_and_currency(value: int) -> None:
    for text in (str(value), f"{value:,}", f"${value:,}.00", f"{value} apples", f"#{value}"[1:] + "."):
        number = read_number(text)
        assert number is not None
        assert number.face == value


@given(st.text(max_size=200))
def test_any_text_is_graded(text: str) -> None:
    found = extract_answer(text)
    assert found is None or found.text


@pytest.mark.parametrize(
    "unit", ["1", "####", "#### \n", "\\boxed{", "{", "}", "answer is ", "$", "1,", "\\frac{1}{", "-", " ", "\nQ:", "١"]
)
def test_a_megabyte_is_read_in_a_second(unit: str, grader: Grader) -> None:
    start = time.process_time()
    grader.grade(unit * (2**20 // len(unit)), "5")
    assert time.process_time() - start < 1


HOSTILE = ["9**9**9**9", "10^{10^{10^{10}}}", "(((9!)!)!)!", "{" * 900 + "5" + "}" * 900, "(" * 1900, r"\sqrt{" * 200]


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda text: text[:12])
def test_hostile_answer_costs_its_bound_and_nothing_else(answer: str, grader: Grader) -> None:
    start = time.monotonic()
    assert grader.compare(answer, "5")[0] in ("unparsable", "wrong")
    assert time.monotonic() - start < 30  # the wall clock's bound, on a machine that is busy
    assert grader.compare("2(k+1)", "2k+2") == ("right", "latex")


def _peak_of_forks(server: int) -> int:
    """Return the most address space, in bytes, that any fork of the server has had so far."""
    peak = 0
    with contextlib.suppress(OSError, IndexError):
        for child in Path(f"/proc/{server}/task/{server}/children").read_text().split():
            status = Path(f"/proc/{child}/status").read_text()
            peak = max(peak, int(status.partition("VmPeak:")[2].split()[0]) * 1024)
    return peak


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="memory is looked up in /proc")
def test_memory_of_an_answer_is_bounded() -> None:
    limit = 512
    with SymbolicComparer(memory_mb=limit) as comparer:
        assert comparer.compare("5", r"\sqrt{25}") == "equal"
        asking = threading.Thread(target=comparer.compare, args=("5", "2^{17179869184}"))  # 2 GiB
        asking.start()
        peak = 0
        while asking.is_alive():
            peak = max(peak, _peak_of_forks(_server_of(comparer)))
            asking.join(0.02)
    assert 0 < peak <= limit * 2**20


def _server_of(comparer: SymbolicComparer) -> int:
    assert comparer._process is not None
    return comparer._process.pid


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _dies(pid: int, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while _is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not _is_alive(pid)


def test_nothing_is_started_while_numbers_and_words_decide() -> None:
    with Grader() as grader:
        for text in ("#### 5", "The answer is $5.00", r"\boxed{1,2}", "none"):
            grader.grade(text, "5,1" if "," in text else "5")
        assert grader._comparer._process is None


def test_process_is_started_again_after_its_death_and_ends_when_closed() -> None:
    with SymbolicComparer() as comparer:
        assert comparer.compare("2k", "k+k") == "equal"
        first = _server_of(comparer)
        os.kill(first, signal.SIGKILL)
        assert _dies(first)
        assert comparer.compare("2k", "k+k") == "equal"
        second = _server_of(comparer)
    assert not _is_alive(second)


def test_threads_share_a_process() -> None:
    verdicts: list[str] = []
    with SymbolicComparer() as comparer:
        asked = [("2k", "k+k", "equal"), ("2k", "k", "different")] * 2
        threads = [
            threading.Thread(target=lambda pair=pair: verdicts.append(comparer.compare(pair[0], pair[1]) == pair[2]))
            for pair in asked
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert verdicts == [True] * 4


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="processes are looked up in /proc")
@pytest.mark.parametrize("kill", [False, True])
def test_no_process_is_left_behind(kill: bool) -> None:
    """Also not when the program is killed while a hostile answer is compared."""
    code = (
        "import sys, looplm.corpora.symbolic as s\n"
        "c = s.SymbolicComparer(cpu_seconds=2)\n"
        "c.compare('2k', 'k+k')\n"
        "print(c._process.pid, flush=True)\n"
        "if sys.argv[1] == 'True': c.compare('5', '10^{10^{10^{10}}}')\n"
    )
    program = subprocess.Popen([sys.executable, "-c", code, str(kill)], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    server = int(program.stdout.readline())
    if kill:
        program.kill()
    program.wait()
    program.stdout.close()
    assert _dies(server)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_neither_uses_nor_stops_the_process_of_its_parent() -> None:
    with SymbolicComparer() as comparer:
        assert comparer.compare("2k", "k+k") == "equal"
        server = _server_of(comparer)
        child = os.fork()
        if child == 0:
            comparer.close()
            os._exit(0 if comparer._process is None else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert comparer.compare("2k", "3k-k") == "equal"
        assert _server_of(comparer) == server


def test_grader_travels_to_another_process_with_its_bounds() -> None:
    twin = pickle.loads(pickle.dumps(Grader(cpu_seconds=5, memory_mb=2048)))
    assert (twin._comparer.cpu_seconds, twin._comparer.memory_mb) == (5, 2048)


@pytest.mark.parametrize(("name", "value"), [("cpu_seconds", 0), ("memory_mb", 100)])
def test_bound_out_of_range_is_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be >= .*got {value}"):
        Grader(**{name: value})


def test_empty_gold_is_refused(grader: Grader) -> None:
    with pytest.raises(ValueError, match="`gold`"):
        grader.grade("#### 5", " ")
