"""Who runs what, on machines with and without the users for it."""

import grp
import pwd

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aitbc_miner.sandbox.users import (
    UNALLOCATED,
    UNALLOCATED_END,
    Identity,
    PrivilegeError,
    job_user,
    resolve,
)

KNOWN = {
    "aitbc": (990, 980),
    "aitbc-job-cpu0": (991, 981),
    "aitbc-job-gpu0": (992, 982),
    "squatter": (UNALLOCATED, 5),
}
NUMBERS = [60733, 61175, 60767]


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a machine with these users, and with a group that took the second of the free numbers."""

    def entry(name: str) -> pwd.struct_passwd:
        uid, gid = KNOWN[name]
        return pwd.struct_passwd((name, "x", uid, gid, "", "/", "/usr/sbin/nologin"))

    def getpwuid(uid: int) -> pwd.struct_passwd:
        return entry(next(name for name, ids in KNOWN.items() if ids[0] == uid))

    def by_id(uid: int) -> pwd.struct_passwd:
        try:
            return getpwuid(uid)
        except StopIteration:
            raise KeyError(uid) from None

    def getgrgid(gid: int) -> grp.struct_group:
        if gid != UNALLOCATED + 1:
            raise KeyError(gid)
        return grp.struct_group(("crowd", "x", gid, []))

    monkeypatch.setattr(pwd, "getpwnam", entry)
    monkeypatch.setattr(pwd, "getpwuid", by_id)
    monkeypatch.setattr(grp, "getgrgid", getgrgid)


@pytest.mark.usefixtures("users")
@pytest.mark.parametrize("mode", ["required", "auto"])
def test_users_that_are_there_are_used(mode: str) -> None:
    found = resolve(mode, "aitbc", ["cpu0", "gpu0"], euid=0)
    assert found.service == Identity(990, 980, "aitbc")
    assert found.jobs == {
        "cpu0": Identity(991, 981, "aitbc-job-cpu0"),
        "gpu0": Identity(992, 982, "aitbc-job-gpu0"),
    }
    assert found.missing == []


@pytest.mark.usefixtures("users")
def test_missing_users_are_refused_by_name_with_the_remedy() -> None:
    with pytest.raises(PrivilegeError) as caught:
        resolve("required", "miner", ["cpu0", "cpu7"], euid=0)
    assert str(caught.value) == (
        "cannot separate privileges: missing users: miner, aitbc-job-cpu7; create them with tools/install "
        "or `useradd --system --user-group NAME`, or set privileges.mode: auto"
    )


@pytest.mark.usefixtures("users")
def test_missing_users_are_replaced_by_numbers_that_belong_to_nobody_each_by_its_own() -> None:
    found = resolve("auto", "miner", ["cpu0", "cpu7", "cpu8"], euid=0)
    assert found.service
    fresh = [found.service, found.jobs["cpu7"], found.jobs["cpu8"]]
    # By a fixed hash of the name: a later version must find the same.
    assert [identity.uid for identity in fresh] == NUMBERS
    assert all(identity.gid == identity.uid for identity in fresh)
    assert found.jobs["cpu0"] == Identity(991, 981, "aitbc-job-cpu0")
    assert found.missing == [
        f"no user miner: its processes run as the unallocated id {NUMBERS[0]}",
        f"no user aitbc-job-cpu7: its processes run as the unallocated id {NUMBERS[1]}",
        f"no user aitbc-job-cpu8: its processes run as the unallocated id {NUMBERS[2]}",
    ]


@pytest.mark.usefixtures("users")
def test_a_number_stays_when_other_users_and_slots_come_and_go() -> None:
    before = resolve("auto", "miner", ["cpu6", "cpu7", "cpu8"], euid=0)
    # The service's user was created, one slot is gone and another is new.
    after = resolve("auto", "aitbc", ["cpu8", "cpu9", "cpu6"], euid=0)
    assert after.jobs["cpu6"] == before.jobs["cpu6"]
    assert after.jobs["cpu8"] == before.jobs["cpu8"]


@pytest.mark.usefixtures("users")
def test_creating_a_user_shifts_no_number_even_where_two_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = [f"slot{number}" for number in range(100)]
    before = resolve("auto", "aitbc", slots, euid=0)
    for number, slot in enumerate(slots[:20]):
        monkeypatch.setitem(KNOWN, job_user(slot), (500 + number, 500))
    after = resolve("auto", "aitbc", slots, euid=0)
    assert {slot: after.jobs[slot] for slot in slots[20:]} == {slot: before.jobs[slot] for slot in slots[20:]}
    assert after.jobs["slot0"].uid == 500


def test_a_number_that_is_taken_is_passed_over(users: None, monkeypatch: pytest.MonkeyPatch) -> None:
    number = resolve("auto", "aitbc", ["cpu7"], euid=0).jobs["cpu7"].uid
    monkeypatch.setitem(KNOWN, "squatter", (number, 5))
    assert resolve("auto", "aitbc", ["cpu7"], euid=0).jobs["cpu7"].uid == number + 1
    crowd = grp.struct_group(("crowd", "x", number + 1, []))
    monkeypatch.setattr(grp, "getgrgid", dict.fromkeys([number + 1], crowd).__getitem__)
    assert resolve("auto", "aitbc", ["cpu7"], euid=0).jobs["cpu7"].uid == number + 2


@given(st.lists(st.sampled_from(["cpu0", "cpu1", "cpu2", "gpu0"]), unique=True))
def test_nobody_shares_a_number_with_anybody_and_nobody_is_root(slots: list[str]) -> None:
    found = resolve("auto", "aitbc-nobody-has-this-name", slots, euid=0)
    assert found.service
    everyone = [found.service, *found.jobs.values()]
    assert len({identity.uid for identity in everyone}) == len(everyone)
    assert all(identity.uid and identity.gid for identity in everyone)
    assert set(found.jobs) == set(slots)


@pytest.mark.parametrize(("numbers", "whose"), [((0, 5), "root's"), ((500, 500), "another user's")])
@pytest.mark.parametrize("mode", ["required", "auto"])
def test_a_slots_user_is_nobody_else(
    users: None, monkeypatch: pytest.MonkeyPatch, mode: str, numbers: tuple[int, int], whose: str
) -> None:
    for name, number in zip(("cpu7", "cpu8"), numbers, strict=True):
        monkeypatch.setitem(KNOWN, job_user(name), (number, 5))
    monkeypatch.setitem(KNOWN, "aitbc", (400, 400))
    with pytest.raises(PrivilegeError, match=rf"the id \d+ of aitbc-job-cpu7 is {whose} as well; remove"):
        resolve(mode, "aitbc", ["cpu7", "cpu8"], euid=0)


@pytest.mark.usefixtures("users")
def test_when_all_numbers_are_taken_that_is_said() -> None:
    slots = [str(number) for number in range(UNALLOCATED_END - UNALLOCATED + 1)]
    with pytest.raises(PrivilegeError, match="cannot find an unallocated user id"):
        resolve("auto", "aitbc", slots, euid=0)


def test_an_ordinary_user_runs_everything_as_itself_and_is_told_what_that_means() -> None:
    found = resolve("auto", "aitbc", ["cpu0"], euid=1000)
    assert (found.service, found.jobs) == (None, {})
    assert found.missing == ["not root: jobs run as the miner's user and can read all files of the miner"]


def test_an_ordinary_user_cannot_separate_what_must_be_separate() -> None:
    with pytest.raises(
        PrivilegeError, match=r"not started as root; start as root, or set privileges.mode: auto"
    ):
        resolve("required", "aitbc", [], euid=1000)


def test_the_name_of_a_slots_user() -> None:
    assert job_user("gpu0") == "aitbc-job-gpu0"
