"""timeline.json is a whole trace after every step, and says who did what."""

import json
from pathlib import Path

from minigpt_ray.timeline import Mark, Span, Timeline, joined


def test_calls_that_follow_closely_are_one_and_others_are_not() -> None:
    spans = [Span(0, "a", 1.0, 2.0), Span(0, "a", 2.001, 3.0), Span(0, "b", 3.0, 4.0), Span(0, "a", 4.0, 5.0), Span(1, "a", 3.0, 3.5), Span(0, "a", 6.0, 7.0)]
    assert [(s.rank, s.name, s.start, s.stop) for s in joined(spans)] == [(0, "a", 1, 3), (0, "b", 3, 4), (0, "a", 4, 5), (0, "a", 6, 7), (1, "a", 3, 3.5)]


def test_the_file_is_a_trace_after_every_step_and_a_resumed_run_goes_on_with_it(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    timeline = Timeline(path, resumed=False)
    timeline.add("policy", [Span(1, "update", 10.0, 10.5)], [Mark("policy restarted", 10.2)], step=3)
    first = json.loads(path.read_text())
    assert [event["ph"] for event in first] == ["M", "X", "i"] and first[0]["args"]["name"] == "policy"
    call = first[1]
    assert (call["name"], call["tid"], call["ts"], call["dur"], call["args"]) == ("update", 1, 10_000_000, 500_000, {"step": 3})
    timeline.add("policy", [Span(0, "logprobs", 11.0, 12.0)])
    Timeline(path, resumed=True).add("critic", [Span(0, "values", 12.0, 13.0)])
    events = json.loads(path.read_text())
    assert [event["name"] for event in events if event["ph"] != "M"] == ["update", "policy restarted", "logprobs", "values"]
    assert len({event["pid"] for event in events}) == 2
    Timeline(path, resumed=False)
    assert not path.exists()


def test_a_file_whose_last_events_were_torn_is_cut_back_to_its_whole_events_when_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    Timeline(path, resumed=False).add("policy", [Span(0, "logprobs", 1.0, 2.0), Span(1, "update", 3.0, 4.0)], [Mark("policy, [restarted]", 5.0)])
    whole = path.read_bytes()
    for torn in [*(whole[:length] for length in range(len(whole) + 1)), whole + b"\0\0", whole[:-1] + b",\n\0\0\0"]:
        path.write_bytes(torn)
        timeline = Timeline(path, resumed=True)
        if path.exists():
            kept = json.loads(path.read_text())
            assert kept == json.loads(whole)[: len(kept)] and len(kept) >= torn.count(b"\n")
        timeline.add("critic", [Span(0, "values", 6.0, 7.0)])
        assert [event["name"] for event in json.loads(path.read_text())][-2:] == ["process_name", "values"]
