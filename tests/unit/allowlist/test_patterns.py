"""The short form: groups of patterns, cut to fit, within a bounded amount of work."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aitbc_miner.allowlist.patterns import Pattern, judge_groups, parse_pattern


def groups(*texts: list[str]) -> list[list[Pattern]]:
    return [[parse_pattern(text) for text in group] for group in texts]


def test_a_choice_that_blocks_another_is_taken_back() -> None:
    # "a" fits both groups, but only by giving it to the second one is there a place for "b".
    assert judge_groups(groups(["[ab]"], ["a"]), ["a", "b"]) is None
    assert judge_groups(groups(["a", "b"], ["a"], ["b", "c"]), ["a", "b", "c"]) is None


@given(
    st.lists(st.lists(st.sampled_from("abc.") | st.just("[ab]"), min_size=1, max_size=3), max_size=5),
    st.lists(st.sampled_from("abc"), max_size=7),
)
def test_the_search_agrees_with_trying_every_order(texts: list[list[str]], args: list[str]) -> None:
    compiled = groups(*texts)
    possible = any(
        len(run) == len(args) and all(p.fullmatch(arg) for p, arg in zip(run, args, strict=True))
        for count in range(len(texts) + 1)
        for order in itertools.permutations(compiled, count)
        for run in [list(itertools.chain.from_iterable(order))]
    )
    assert (judge_groups(compiled, args) is None) == possible


def test_alike_groups_are_no_work() -> None:
    many = groups(*[["a.*"]] * 64)
    assert judge_groups(many, ["a"] * 64) is None
    assert judge_groups(many, [f"a{number}" for number in range(64)]) is None
    assert "argument 64 ('b')" in str(judge_groups(many, ["a"] * 63 + ["b"]))
    assert "argument 65" in str(judge_groups(many, ["a"] * 65))


def test_dozens_of_groups_with_a_value_each_are_no_trouble() -> None:
    many = groups(*[[f"-o{number}", "[a-z0-9]{1,32}"] for number in range(64)])
    args = [word for number in range(30) for word in (f"-o{number}", f"value{number}")]
    assert judge_groups(many, args) is None


LETTERS = [chr(0x100 + number) for number in range(60)]
# Each group fits all but two letters, a pair of its own, and two arguments have one group between them.
PAIRS = [[f"[^{LETTERS[i]}{LETTERS[(i * 7 + 3) % 60]}xy]"] for i in range(60)] + [["[xy]"]]


@pytest.mark.parametrize(
    ("texts", "args"),
    [
        (PAIRS, [*LETTERS[:40], "x", "y"]),
        ([[f"[^{letter}]"] * 8 for letter in LETTERS], LETTERS * 8),
        ([[f"a.*|{number}"] for number in range(64)], [f"a{number}" for number in range(63)] + ["b"]),
        ([[".*a[ab]{900}"]], ["ab" * 50_000]),
        ([["(.?){500}x"]] * 64, ["a" * 2000 + letter for letter in LETTERS]),
    ],
)
def test_hostile_arguments_end_within_the_work_limit(texts: list[list[str]], args: list[str]) -> None:
    compiled = groups(*texts)
    took = []
    for _ in range(3):
        start = time.process_time()
        objection = judge_groups(compiled, args)
        took.append(time.process_time() - start)
        assert objection is not None
    # 10 ms on a machine that has nothing else to do.
    assert min(took) < 0.1
    assert "takes too much work" in str(objection)


def test_an_objection_names_its_group_where_there_is_one() -> None:
    compiled = groups(["-a"], ["-b", "[0-9]"], ["-b", "x"])
    for args, at, rule, fits in [
        (["-a", "-a"], 1, "args", ()),
        (["-c"], 0, "args", ("'-a'", "'-b'")),
        (["-b", "z"], 1, "args", ("'[0-9]'", "'x'")),
        (["-b", "x", "-b", "x"], 2, "args", ()),
        (["-b", "x", "-b"], 3, "args", ("'[0-9]'", "'x'")),
    ]:
        objection = judge_groups(compiled, args)
        assert objection is not None
        assert (objection.at, objection.rule, objection.fits) == (at, rule, fits)
    objection = judge_groups(groups(["-a", "1"]), ["-a", "2"])
    assert objection is not None
    assert objection.rule == "args[0]"
