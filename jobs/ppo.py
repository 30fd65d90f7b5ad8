"""PPO: reinforcement learning from rewards, driven from this page.

    python -m jobs.ppo configs/debug/ppo.yaml                                            one machine, no GPU needed
    ray job submit --working-dir . --runtime-env deploy/runtime_env.yaml -- python -m jobs.ppo configs/ppo.yaml        a cluster

The generator (vLLM), the policy and critic learners (DeepSpeed), the frozen reference and the reward sources are Ray
actors; this driver starts work, gathers results and logs. Rollouts, Scores and Experience are defined in
minigpt_ray/rl/experience.py, what is computed from them in minigpt_ray/rl/step.py.
"""

from actors.parent import keep_running
from minigpt_ray.cli import load_config, one_sentence
from minigpt_ray.config import PPOConfig


def train(config: PPOConfig) -> None:
    """Run PPO from the newest checkpoint (checkpoint.resume=auto) or from the beginning."""
    from actors.preparation import Preparation

    with one_sentence():  # bad input is refused before any process starts, and most of it before torch is imported
        ready = Preparation(config)

    from actors.placement import Cluster

    with one_sentence():  # so is a request that the cluster cannot hold
        cluster = Cluster(config.placement, ready.roles, ready.memory)

    from actors.collection import collect
    from actors.critic import start_critic
    from actors.evaluation import log_evaluation, sample_row
    from actors.generator import Generator
    from actors.group import Pending, gather
    from actors.policy import Policy
    from actors.reference import Reference
    from actors.rewards import Rewards
    from actors.training import SENTENCES, Training
    from minigpt_ray.object_store import deliver
    from minigpt_ray.rl.experience import Rollout, RolloutBatch, Scores, TrainingState
    from minigpt_ray.rl.metrics import rollout_metrics, score_metrics
    from minigpt_ray.rl.step import make_experience
    from minigpt_ray.tracking import Timer

    with one_sentence(SENTENCES), cluster, ready.tracker() as tracker:
        tensor_parallel, tolerance = config.placement.generator.tensor_parallel, config.weights.probe_tolerance
        generator = Generator(cluster, ready.policy_path, config.generator, ready.max_model_len, tensor_parallel, config.seed, tolerance)
        policy, critic, reference = Policy(cluster, config), start_critic(cluster, config), Reference(cluster, config)
        rewards = Rewards(cluster, config.rewards, config.run_dir, ready.policy_path, config.restart_limit)

        def score(rollouts: list[Rollout]) -> Pending[Scores]:
            """What every role says about some rollouts, all at once."""
            batch = RolloutBatch.of(rollouts)
            parts = gather(policy.logprobs(batch), reference.logprobs(batch), critic.values(batch), rewards.score(rollouts, batch))
            return parts.then(lambda parts: Scores(*parts))

        def step(state: TrainingState) -> TrainingState:
            """Collect, compare, learn, publish, log."""
            timer = Timer(tracker.phase)
            rollouts, batch, scores, counts = collect(training.prompts, generator, score, config, timer)
            with timer("advantage"):
                experience, state = make_experience(batch, scores, config.algorithm, state)
            training.begin_update()
            with timer("learn"):
                learnt = gather(policy.update(experience), critic.update(experience)).result()
            with timer("publish"):
                generator.receive(policy.publish(state.step))

            measured = rollout_metrics(rollouts, state.step - 1) | score_metrics(rollouts, batch, scores, experience) | counts
            tracker.log(state.step, training.metrics(state, batch, learnt, timer) | measured | learnt[0] | learnt[1] | generator.metrics() | rewards.metrics())
            tracker.samples(state.step, map(sample_row, rollouts[: config.logging.samples_per_step], scores.rewards.total.tolist()))
            tracker.batch(state.step, batch=batch, scores=scores, experience=experience)
            if config.evaluation.due(state.step, config.steps):
                log_evaluation(tracker, state.step, generator, rewards, ready.held_out, config.evaluation)
            return state

        training = Training(ready, tracker, generator, policy, critic, [reference, *rewards.groups])
        if training.state.step == 0:
            log_evaluation(tracker, 0, generator, rewards, ready.held_out, config.evaluation)
        training.run(step)
        policy.export(ready.directory / "model")
        deliver(ready.directory / "model", config.export_to, config.run, "ppo", tracker.message)


if __name__ == "__main__":
    keep_running(train, load_config(PPOConfig))
