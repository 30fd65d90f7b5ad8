"""Score models on held-out prompts.

    python -m jobs.evaluate configs/evaluate.yaml models=[sft,ppo]
    python -m jobs.evaluate configs/evaluate.yaml models=[sft,ppo] pass_at=[1,4,16] baseline=sft data.files=[prompts.jsonl]

Each model generates with the same engine, sampling and seeds as in PPO's own evaluations. Writes
<run_dir>/evaluate/results.json, every figure with the ends of its 95 % interval, and a report of the whole run, and prints a table.
"""

from actors.parent import keep_running
from minigpt_ray.cli import load_config, one_sentence
from minigpt_ray.config import EvaluateConfig


def run(config: EvaluateConfig) -> None:
    """Evaluate every model, one after the other."""
    from actors.preflight import check_engine
    from actors.reward_sources import check_sources, check_vocabularies, reward_models
    from minigpt_ray.data.prompts import encode_prompts, longest, read_prompts
    from minigpt_ray.model_directory import check_context, resolve_model
    from minigpt_ray.tokenizer import load_tokenizer

    with one_sentence():  # the first tokenizer brings torch; most of what can be refused is refused before
        check_engine(config.generator, config.placement.generator)
        paths = {name: resolve_model(name, config.run_dir) for name in config.models}
        rows = read_prompts(config.data, config.stage_dir("prepare_data") / "held_out.jsonl")
        check_sources(config.rewards, config.run_dir)
        tokenizers = {name: load_tokenizer(path) for name, path in paths.items()}
        check_vocabularies(config.rewards, config.run_dir, tokenizers)
        held_out = {name: encode_prompts(config.data, rows, tokenizer).prompts[: config.num_prompts] for name, tokenizer in tokenizers.items()}
        for name, path in paths.items():
            readers = {name: path} | reward_models(config.rewards, config.run_dir)
            check_context(readers, {"data": longest(held_out[name])}, {"sampling.max_tokens": config.sampling.max_tokens})

    from rich.console import Console

    from actors.evaluation import SENTENCES, at_temperature_one, judge
    from actors.generator import Generator
    from actors.placement import Cluster, PlacementError, roles_of_evaluation
    from actors.rewards import Rewards
    from minigpt_ray.checkpoint import write_json_atomic
    from minigpt_ray.cli import write_resolved
    from minigpt_ray.evaluation import Judged, figures, pass_figures, results_table, win_rate
    from minigpt_ray.memory import per_process
    from minigpt_ray.report import write_report

    results: dict[str, dict[str, float]] = {}
    judged: dict[str, Judged] = {}
    console = Console()
    placement = config.placement
    with one_sentence((PlacementError, *SENTENCES)), Cluster(placement, roles_of_evaluation(placement, config.rewards), per_process(config)) as cluster:
        rewards = Rewards(cluster, config.rewards, config.run_dir, next(iter(paths.values())), config.restart_limit)
        generator: Generator | None = None
        for number, (name, path) in enumerate(paths.items()):
            prompts = held_out[name]
            with console.status(f"{name}: {len(prompts)} held-out prompts"):
                if generator is None or not generator.can_use(path):  # else its engine, which takes long to start, loads the next weights
                    if generator is not None:
                        generator.close()
                    room = longest(prompts) + config.sampling.max_tokens
                    generator = Generator(cluster, path, config.generator, room, placement.generator.tensor_parallel, config.seed)
                    for role in (*rewards.groups, generator):
                        role.ready()
                generator.use_checkpoint(number, path)
                judged[name] = judge(generator, rewards, prompts, config.sampling)
                results[name] = figures(judged[name], config.seed)
                if config.sampled:
                    results[name] |= figures(judge(generator, rewards, prompts, at_temperature_one(config.sampling)), config.seed, "eval/sampled_")
                if config.pass_at:
                    drawn = judge(generator, rewards, prompts, at_temperature_one(config.sampling, config.pass_samples))
                    results[name] |= pass_figures(drawn, config.pass_samples, config.pass_at, config.seed)
    if config.baseline is not None:
        for name in [name for name in config.models if name != config.baseline]:
            results[name] |= win_rate(judged[name], judged[config.baseline], config.judge, config.baseline, config.seed)
    write_resolved(config, config.stage_dir("evaluate"))
    write_json_atomic(config.stage_dir("evaluate") / "results.json", results)
    console.print(results_table(results, len(next(iter(held_out.values())))))
    console.print(f"report: {write_report(config.run_dir)}", soft_wrap=True)


if __name__ == "__main__":
    keep_running(run, load_config(EvaluateConfig))
