"""Make preference pairs of a model's own answers, for DPO on policy and for reward models.

    python -m jobs.generate_preferences configs/generate_preferences.yaml model=sft

The model answers each prompt `sampling.n` times, the reward sources score the answers, and pairs of better and worse ones are
written to <run>/generate_preferences: preferences.jsonl and held_out.jsonl, which share no prompt, and manifest.json with the
counts, complete or not at all.
"""

from actors.parent import keep_running
from minigpt_ray.cli import load_config, one_sentence
from minigpt_ray.config import GeneratePreferencesConfig

STAGE = "generate_preferences"


def run(config: GeneratePreferencesConfig) -> None:
    """Answer, score, pair, write; nothing when the same configuration and model have done so before."""
    from rich.console import Console

    from actors.preflight import check_engine
    from actors.reward_sources import check_sources, check_vocabularies, reward_models
    from minigpt_ray.data.preferences import PairFile, load_right_answers, make_pairs, summary
    from minigpt_ray.data.prompts import encode_prompts, longest, read_prompts
    from minigpt_ray.model_directory import check_context, resolve_model
    from minigpt_ray.tokenizer import load_tokenizer

    console = Console()
    with one_sentence():  # the tokenizer brings torch; most of what can be refused is refused before
        path = resolve_model(config.model, config.run_dir)
        judges = reward_models(config.rewards, config.run_dir)
        file = PairFile(config.stage_dir(STAGE), config, path, judges)
        if file.is_complete:
            console.print(f"{file.directory} is complete and was made by this config and model; nothing to do", soft_wrap=True)
            return
        default = config.stage_dir("prepare_data") / "prompts.jsonl"
        check_engine(config.generator, config.placement.generator)
        rows = read_prompts(config.data, default)
        check_sources(config.rewards, config.run_dir)
        tokenizer = load_tokenizer(path)
        prompts = encode_prompts(config.data, rows, tokenizer).prompts[: config.num_prompts]
        check_vocabularies(config.rewards, config.run_dir, {config.model: tokenizer})
        check_context({config.model: path} | judges, {"data": longest(prompts)}, {"sampling.max_tokens": config.sampling.max_tokens})
        right = load_right_answers(config.data, default, prompts, tokenizer) if config.right_answer else {}
        left = file.take_over(prompts)
        if len(left) < len(prompts):
            before = f"{len(prompts) - len(left)} of {len(prompts)} prompts were answered and scored before"
            console.print(f"{before}; the job goes on with the others ({file.kept}; remove it to begin anew)", soft_wrap=True, markup=False, highlight=False)

    from actors.evaluation import SENTENCES, judged_answers
    from actors.generator import Generator
    from actors.placement import Cluster, roles_of_evaluation
    from actors.rewards import Rewards
    from minigpt_ray.memory import per_process

    with one_sentence():
        cluster = Cluster(config.placement, roles_of_evaluation(config.placement, config.rewards), per_process(config))
    with one_sentence(SENTENCES), cluster, console.status("loading the model and the reward sources") as status:
        room = longest(prompts) + config.sampling.max_tokens
        generator = Generator(cluster, path, config.generator, room, config.placement.generator.tensor_parallel, config.seed)
        rewards = Rewards(cluster, config.rewards, config.run_dir, path, config.restart_limit)
        for role in (*rewards.groups, generator):
            role.ready()
        generator.use_checkpoint()
        for answers in judged_answers(generator, rewards, left, right, config.sampling, config.prompts_per_batch):
            file.add(answers.prompt, *make_pairs(answers, config, tokenizer.all_special_tokens))
            status.update(f"{file.counts['prompts']} of {len(prompts)} prompts, {file.counts['pairs']} pairs")
    with one_sentence():
        file.write()
    console.print(summary(file.counts))
    console.print(str(file.directory), soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    keep_running(run, load_config(GeneratePreferencesConfig))
