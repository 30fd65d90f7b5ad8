"""The hosts that the other tests run on: nothing is left of them after a failure, and they can do without namespaces."""

import shutil
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import cluster, namespaces_are_permitted, run

pytestmark = pytest.mark.cluster
LABELS = {"mgr-head": "role=learner", "mgr-other": "role=generator"}


def namespaces() -> set[str]:
    """Of these hosts, and what connects them."""
    if shutil.which("ip") is None:
        return set()
    found = {*run("ip", "netns", "list", check=False).stdout.split(), *run("ip", "-brief", "link", check=False).stdout.split()}
    return {name for name in found if name.startswith("mgr")}


def fail_in_a_cluster(home: Path, isolated: bool) -> list[psutil.Process]:
    """A test that fails once the nodes are there; the processes that these had."""
    processes: list[psutil.Process] = []
    with pytest.raises(ZeroDivisionError), cluster(home, LABELS, cpus=1) as hosts:
        assert hosts.isolated == isolated and len({host.address for host in hosts.hosts}) == (len(LABELS) if isolated else 1)
        assert bool(namespaces()) == isolated
        processes += [process for host in hosts.hosts for process in host.processes()]
        assert {"gcs_server", "raylet"} <= {process.name() for process in processes}
        raise ZeroDivisionError
    return processes


def test_nothing_is_left_of_hosts_when_a_test_fails(tmp_path: Path) -> None:
    if not namespaces_are_permitted():
        pytest.skip("namespaces are not permitted here")
    processes = fail_in_a_cluster(tmp_path, isolated=True)
    assert not namespaces() and not [process for process in processes if process.is_running()]


def test_without_namespaces_nodes_share_the_machine_s_address_which_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.cluster.hosts.namespaces_are_permitted", lambda: False)
    with pytest.warns(UserWarning, match="the nodes of the cluster share this machine's address"):
        processes = fail_in_a_cluster(tmp_path, isolated=False)
    assert not [process for process in processes if process.is_running()]
