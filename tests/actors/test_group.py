"""The driver sends a method, never its name, and gets results in rank order, with the ranks' own exceptions."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import ray
import torch
import torch.distributed as dist
from ray import cloudpickle

from actors import watchdog
from actors.group import GRACE_SECONDS, Group, Pending, RoleLost, by_reference, covered_seconds, gather, get_all
from actors.placement import Cluster
from actors.rank_host import Disconnected, Rank, Shared, telling_disconnections
from actors.watchdog import START_SECONDS, Limit, collective_timeout
from minigpt_ray.config import PlacementConfig, RolePlacement
from minigpt_ray.timeline import Span

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks' processes cannot import a test


@dataclass(frozen=True)
class Table:
    rows: torch.Tensor


class Adder:
    """A rank that adds."""

    def __init__(self, rank: Rank, start: int) -> None:
        self.rank, self.start = rank, start

    def add(self, number: int) -> int:
        return self.start + number + 100 * self.rank.index

    def doubled(self, table: Table) -> torch.Tensor:
        return 2 * table.rows[self.rank.share(len(table.rows))]

    def slow(self) -> int:
        time.sleep(0.5)
        return os.getpid()

    def naps(self) -> int:
        time.sleep(5)
        return os.getpid()

    def hangs_once(self, memory: Path) -> int:
        """On rank 1, unless it has done so before."""
        if self.rank.index == 1 and not memory.exists():
            memory.touch()
            time.sleep(60)
        return self.rank.index

    def sum_over_ranks(self) -> float:
        """A collective of all hosts."""
        value = torch.tensor([float(self.rank.index + 1)])
        dist.all_reduce(value)
        return float(value)

    def leaves_the_group(self) -> None:
        """On rank 1, which lives on; the others wait for it in a collective."""
        if self.rank.index == 1:
            dist.destroy_process_group()
            time.sleep(60)
        dist.all_reduce(torch.zeros(1))

    def patience(self) -> list[timedelta]:
        """How long collectives wait: of the group of all hosts, and of one that a library makes."""
        groups = (dist.group.WORLD, dist.new_group([0, 1]))
        return [group._get_backend(torch.device("cpu")).options._timeout for group in groups if isinstance(group, dist.ProcessGroup)]

    def fails(self, text: str) -> None:
        if self.rank.index == 1:
            raise ValueError(text)


@pytest.fixture(scope="module")
def adders(ray_cluster: None) -> Iterator[Group[Adder]]:
    """Two ranks in processes of their own, with a process group."""
    with Cluster(PlacementConfig(), {"adder": RolePlacement(ranks=2)}) as cluster:
        group = Group(cluster, "adder", Adder, 10, form_group=True)
        group.ready()
        yield group


@pytest.mark.parametrize(("size", "world"), [(8, 2), (7, 3), (2, 5), (0, 2)])
def test_shares_cover_all_rows_and_differ_by_at_most_one(size: int, world: int) -> None:
    shares = [range(size)[Rank(index, world, "cpu").share(size)] for index in range(world)]
    assert [row for share in shares for row in share] == list(range(size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.ray
def test_a_method_runs_on_every_rank_with_results_in_rank_order(adders: Group[Adder]) -> None:
    assert adders.call(Adder.add, 5).result() == [15, 115]
    assert adders.first(Adder.add, 5).result() == 15
    assert adders.each(Adder.add, [(1,), (2,)]).result() == [11, 112]


@pytest.mark.ray
@pytest.mark.parametrize("size", [1, 2, 5])
def test_scattered_rows_come_back_in_their_order(adders: Group[Adder], size: int) -> None:
    table = Table(torch.arange(size * 2).reshape(size, 2))
    assert torch.equal(adders.scatter(Adder.doubled, table, torch.cat).result(), 2 * table.rows)


@pytest.mark.ray
def test_ranks_of_a_group_form_one_process_group(adders: Group[Adder]) -> None:
    assert adders.call(Adder.sum_over_ranks).result() == [3.0, 3.0]


@pytest.mark.ray
def test_collectives_wait_longer_than_the_watchdog(adders: Group[Adder]) -> None:
    """Else the rank that waits fails first, and the one that hangs is not found."""
    twice = timedelta(seconds=2 * PlacementConfig().hang_after_s)
    assert adders.call(Adder.patience).result() == [[twice, twice], [twice, twice]]
    assert collective_timeout(1.0) > timedelta(seconds=START_SECONDS)


@pytest.mark.ray
def test_an_exception_of_a_rank_arrives_with_its_type_and_place(adders: Group[Adder]) -> None:
    with pytest.raises(ValueError, match="no such thing") as caught:
        adders.call(Adder.fails, "no such thing").result()
    assert "in fails" in str(caught.value) and "test_group.py" in str(caught.value)
    assert adders.call(Adder.add, 0).result() == [10, 110]  # the ranks live on


@pytest.mark.ray
def test_ranks_work_side_by_side_and_gather_waits_for_all(adders: Group[Adder]) -> None:
    adders.call(Adder.add, 0).result()
    start = time.perf_counter()
    both = adders.call(Adder.slow)
    assert time.perf_counter() - start < 0.4  # pending, not done
    pids, number = gather(both, adders.first(Adder.add, 1).then(lambda n: n + 1)).result()
    assert len(set(pids)) == 2 and os.getpid() not in pids
    assert number == 12
    assert gather(Pending.done("a"), Pending.done(2)).result() == ("a", 2)


@pytest.mark.ray
def test_a_call_that_hangs_is_said_with_its_stack_and_its_process_counts_as_dead(ray_cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once in a call that waits for ever, once in a process that was stopped."""
    with Cluster(PlacementConfig(hang_after_s=4), {"adder": RolePlacement(ranks=2)}) as cluster:
        group = Group(cluster, "adder", Adder, 10, restarts=2)
        group.ready()
        assert group.call(Adder.hangs_once, tmp_path / "memory").result() == [0, 1]
        assert group.restarts == 1
        (message,) = [record.getMessage() for record in caplog.records if record.name == "actors.watchdog"]
        assert re.match(r"adder rank 1 of 2 \(process \d+ on [\d.]+, sleeping\) has been in Adder.hangs_once for 4 s and counts as dead; it was\n", message)
        assert re.search(r"test_group.py.*, line \d+ in hangs_once", message) and "in call" in message

        caplog.clear()
        pids = group.call(Adder.slow).result()
        pending = group.call(Adder.hangs_once, tmp_path / "of a process that is stopped")
        while not (tmp_path / "of a process that is stopped").exists():
            time.sleep(0.05)
        os.kill(pids[1], signal.SIGSTOP)
        assert pending.result() == [0, 1]
        assert group.restarts == 2
        (message,) = [record.getMessage() for record in caplog.records if record.name == "actors.watchdog"]
        assert (
            f"adder rank 1 of 2 (process {pids[1]} on " in message
            and ", stopped) has been in Adder.hangs_once for 4 s" in message
            and "in hangs_once" in message
        )


def reports_in_vain(pid: int) -> tuple[str, str]:
    """What becomes of a process that waits for a disk that is gone: no signal ends it."""
    return "disk-sleep", "in a state in which it answers no signal"


@pytest.mark.ray
def test_a_process_that_no_signal_ends_counts_as_dead_too(
    ray_cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "examine_and_kill", reports_in_vain)
    with Cluster(PlacementConfig(hang_after_s=4), {"adder": RolePlacement(ranks=2)}) as cluster:
        group = Group(cluster, "adder", Adder, 10, restarts=1)
        group.ready()
        assert group.call(Adder.hangs_once, tmp_path / "memory").result() == [0, 1]
        assert group.restarts == 1
        (message,) = [record.getMessage() for record in caplog.records if record.name == "actors.watchdog"]
        assert ", disk-sleep) has been in Adder.hangs_once for 4 s and counts as dead" in message


@pytest.mark.ray
def test_calls_that_do_not_end_exceed_their_limit_again(ray_cluster: None) -> None:
    """As long as whoever is told has not ended them."""
    sleeping = ray.remote(lambda: time.sleep(60)).remote()
    told: list[float] = []

    def exceeded(late: Sequence[int]) -> None:
        told.append(time.monotonic())
        if len(told) == 3:
            ray.cancel(sleeping, force=True)

    begin = time.monotonic()
    with pytest.raises(ray.exceptions.RayError):
        get_all([sleeping], Limit(0.5, exceeded))
    assert len(told) >= 3 and told[2] - begin > 1.4


class Unlucky:
    """A rank whose process dies in its first call, and whose successor while it is built."""

    def __init__(self, rank: Rank, memory: Path) -> None:
        self.memory = memory
        self.lives = len(memory.read_text()) if memory.exists() else 0
        if self.lives == 1:
            self.die()

    def die(self) -> None:
        self.memory.write_text("x" * (self.lives + 1))
        os._exit(1)

    def live(self) -> int:
        if self.lives == 0:
            self.die()
        return self.lives


@pytest.mark.ray
@pytest.mark.parametrize("restarts", [2, 1])
def test_a_process_that_dies_while_it_is_built_in_the_place_of_another_is_replaced_too(ray_cluster: None, tmp_path: Path, restarts: int) -> None:
    with Cluster(PlacementConfig(), {"unlucky": RolePlacement()}) as cluster:
        group = Group(cluster, "unlucky", Unlucky, tmp_path / "lives", restarts=restarts)
        group.ready()
        if restarts == 2:
            assert group.call(Unlucky.live).result() == [2] and group.restarts == 2
        else:
            with pytest.raises(RoleLost, match=r"unlucky rank 0 of 1 \(process \d+ on [\d.]+\) died"):
                group.call(Unlucky.live).result()


@pytest.mark.ray
def test_a_process_that_dies_before_the_group_is_formed_is_a_loss_of_the_role_and_another_start_finds_its_room(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a host that is gone and not yet known to be; what was started beside it must not hold its place."""
    hosts = Cluster.hosts

    def first_dies(cluster: Cluster, role: str) -> list[object]:
        found = hosts(cluster, role)
        ray.kill(found[0])
        return found

    with Cluster(PlacementConfig(), {"adder": RolePlacement(ranks=2)}) as cluster:
        group = Group(cluster, "adder", Adder, 10, form_group=True)
        group.ready()
        with monkeypatch.context() as patched:
            patched.setattr(Cluster, "hosts", first_dies)
            with pytest.raises(RoleLost, match=r"adder rank 0 of 2 \(.*\) died"):
                group.restart()
        group.restart()
        assert group.call(Adder.sum_over_ranks).result() == [3.0, 3.0]


@pytest.mark.ray
def test_calls_that_were_made_before_a_process_died_are_all_repeated_and_cost_one_restart(ray_cluster: None) -> None:
    """As the chunks of a step, which are all asked for before the first answer is looked at."""
    with Cluster(PlacementConfig(), {"adder": RolePlacement()}) as cluster:
        group = Group(cluster, "adder", Adder, 10, restarts=1)
        group.ready()
        assert group.who_died() == ""
        pending = [group.call(Adder.naps), *(group.call(Adder.add, number) for number in range(3))]
        os.kill(group.whereabouts()[0]["pid"], signal.SIGKILL)
        (pid,) = pending[0].result()
        assert [p.result() for p in pending[1:]] == [[10], [11], [12]] and group.restarts == 1
        assert pid == group.whereabouts()[0]["pid"]


def test_what_gloo_says_of_a_wrong_call_is_an_exception_of_the_code() -> None:
    with pytest.raises(Disconnected, match="Connection closed by peer"), telling_disconnections():
        raise RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:46274")
    for error in (RuntimeError("[enforce fail at /third_party/gloo/gloo/types.h:29] op.preamble.length <= op.nbytes"), ValueError("no /gloo/ here")):
        with pytest.raises(type(error)) as caught, telling_disconnections():
            raise error
        assert caught.value is error


@pytest.mark.ray
def test_a_collective_that_breaks_is_a_loss_of_the_role_and_no_exception_of_its_code(ray_cluster: None) -> None:
    with Cluster(PlacementConfig(), {"adder": RolePlacement(ranks=2)}) as cluster:
        group = Group(cluster, "adder", Adder, 10, form_group=True)
        group.ready()
        with pytest.raises(RoleLost, match=r"ranks of adder lost each other, and none of them died \(Disconnected: RuntimeError: .*gloo"):
            group.call(Adder.leaves_the_group).result()
        group.restart()
        assert group.call(Adder.sum_over_ranks).result() == [3.0, 3.0]


@pytest.mark.ray
def test_of_a_process_that_takes_no_connections_ray_s_word_is_waited_for(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host that is gone, Ray knows of no death for a minute; until then whoever is started there would die unborn."""
    with Cluster(PlacementConfig(), {"adder": RolePlacement(ranks=2)}) as cluster:
        group = Group(cluster, "adder", Adder, 10, form_group=True)
        group.ready()
        pid = group.whereabouts()[1]["pid"]
        assert all(map(watchdog.answers, group.hosts))
        knows, is_dead = time.monotonic() + GRACE_SECONDS + 4, watchdog.is_dead
        for place in ("actors.group.is_dead", "actors.watchdog.is_dead"):
            monkeypatch.setattr(place, lambda host: time.monotonic() > knows and is_dead(host))
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RoleLost, match=rf"^adder rank 1 of 2 \(process {pid} on [\d.]+\) died$"):
            group.call(Adder.sum_over_ranks).result()
        assert time.monotonic() > knows
        assert group.who_died() == f"adder rank 1 of 2 ({watchdog.place_of(group.hosts[1])}) died"
        assert [watchdog.answers(host) for host in group.hosts] == [True, False]


@pytest.mark.ray
def test_a_call_that_may_take_long_is_ended_only_if_its_process_gives_no_sign_of_life(ray_cluster: None, caplog: pytest.LogCaptureFixture) -> None:
    """Slow is not dead: the calls of the rewards, all attempts of all sources, may take longer than others."""
    with Cluster(PlacementConfig(hang_after_s=2), {"rewards": RolePlacement()}) as cluster:
        group = Group(cluster, "rewards", Adder, 10, restarts=1)
        group.ready()
        cluster.grant("rewards", 600)
        (pid,) = group.call(Adder.naps).result()
        assert group.restarts == 0
        pending = group.call(Adder.naps)
        os.kill(pid, signal.SIGSTOP)
        assert pending.result() != [pid] and group.restarts == 1
        (message,) = [record.getMessage() for record in caplog.records if record.name == "actors.watchdog"]
        assert re.match(rf"rewards rank 0 of 1 \(process {pid} on [\d.]+, stopped\) has been in Adder.naps for \d s and counts as dead", message)


@pytest.mark.ray
def test_idle_share_is_the_time_that_the_busiest_rank_did_not_work(adders: Group[Adder]) -> None:
    adders.call(Adder.slow).result()  # between steps: does not count
    adders.reset_usage()
    adders.call(Adder.slow).result()
    metrics = adders.usage_metrics(1.0)
    assert metrics["time/idle_share/adder"] == pytest.approx(0.5, abs=0.1)
    assert 0.1 < metrics["memory/adder_gib"] < 8  # two processes with torch
    assert [(span.rank, span.name) for span in adders.usage.spans] == [(0, "slow"), (1, "slow")]
    adders.reset_usage()
    assert adders.usage_metrics(1.0)["time/idle_share/adder"] == 1.0


@pytest.mark.ray
def test_a_value_lies_in_the_object_store_once_while_it_lives(ray_cluster: None) -> None:
    table = Table(torch.ones(3, 2))
    shared = by_reference(table)
    assert isinstance(shared, Shared) and by_reference(table) is shared
    assert torch.equal(ray.get(shared.ref).rows, table.rows)
    assert by_reference(Table(table.rows)) is not shared
    for plain in (5, "text", [table], Table):
        assert by_reference(plain) is plain


def test_spans_that_overlap_count_once_and_gaps_not() -> None:
    def covered(*spans: tuple[float, float]) -> float:
        return covered_seconds([Span(0, "call", start, stop) for start, stop in spans])

    assert covered() == 0
    assert covered((1.0, 2.0), (4.0, 5.5)) == 2.5
    assert covered((4.0, 6.0), (1.0, 5.0), (2.0, 3.0)) == 5.0


LISTENING = """
import socket
import psutil, torch
import torch.distributed as dist
from actors.rank_host import RankHost

with socket.create_server(("127.0.0.1", 0)) as probe:
    port = probe.getsockname()[1]
RankHost(0, 1, "cpu").join("127.0.0.1", port, 60)
dist.all_reduce(torch.ones(2), group=dist.new_group([0]))
print(*{connection.laddr.ip for connection in psutil.Process().net_connections() if connection.status == "LISTEN"})
"""


def test_a_process_group_on_one_machine_listens_to_this_machine_alone() -> None:
    """torch's store would listen at every address, without asking who comes."""
    done = subprocess.run([sys.executable, "-c", LISTENING], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["127.0.0.1"]
