"""What is plotted: the panels of a chapter, each with the sentence that explains it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One curve of a panel."""

    metric: str
    label: str
    points: bool = False
    """Drawn as marks joined by a line: measured now and then, not in every step."""
    over: str = ""
    """The metric that it is divided by."""


@dataclass(frozen=True)
class Panel:
    """One small plot and the sentence that explains it."""

    title: str
    caption: str
    lines: tuple[Line, ...] = ()
    group: str = ""
    """Besides `lines`, one curve for each metric whose name begins so, labelled by the rest of its name."""
    without: tuple[str, ...] = ()
    """Metrics of the group that belong elsewhere."""
    log: bool = False
    noisy: bool = True
    """A long curve is drawn as its moving average, the steps faint behind it."""
    zero_says_nothing: bool = False
    """Left out while every value is 0."""


PANELS = (
    Panel(
        "Reward",
        "Mean reward of a response, before the KL penalty; dots are held-out prompts, answered greedily. This is what PPO raises.",
        (Line("train/reward", "training, sampled"), Line("eval/mean_reward", "held out, greedy", points=True)),
    ),
    Panel(
        "Held-out exact match",
        "Share of held-out prompts answered exactly right: greedily, and with one answer drawn at temperature 1.",
        (Line("eval/accuracy", "greedy", points=True), Line("eval/sampled_accuracy", "sampled", points=True)),
    ),
    Panel("Reward by reward source", "Mean score of each source, unweighted: which of them the model has learnt to please.", group="reward/", without=("reward/std", "reward/failed")),
    Panel("Reward by data source", "Mean weighted reward on the prompts of each source of data.", group="reward_by_source/"),
    Panel("Loss", "Mean negative log-likelihood, or preference loss, in nats: lower is better; a gap to the validation curve is overfitting.", (Line("train/loss", "training"), Line("validation/loss", "validation", points=True))),
    Panel("Perplexity", "exp(loss): among how many equally likely tokens the model seems to choose.", (Line("train/perplexity", "training"), Line("validation/perplexity", "validation", points=True), Line("validation/unigram_perplexity", "to one who knows frequencies alone", points=True)), log=True),
    Panel("Loss by source", "Validation loss on the rows of each source of data: which of them is still being learnt.", group="validation/loss/"),
    Panel("Accuracy", "Share of tokens, or of preference pairs, that the model ranks first.", (Line("train/accuracy", "training"), Line("validation/accuracy", "validation", points=True))),
    Panel("Reward margin", "Reward of the preferred answer minus that of the other.", (Line("train/margin", "training"), Line("validation/margin", "validation", points=True))),
    Panel("Chosen and rejected", "Rewards of the two answers apart: a margin can grow while both fall.", (Line("train/chosen_reward", "chosen"), Line("train/rejected_reward", "rejected"), Line("validation/chosen_reward", "chosen, validation", points=True), Line("validation/rejected_reward", "rejected, validation", points=True))),
    Panel("KL to the reference", "How far the policy has moved from where it began, in nats per token; fast growth with little reward is over-optimisation.", (Line("train/kl_ref", "to the reference"),)),
    Panel("KL of one step", "How far the updates of one step move the policy, in nats per token; spikes mean too large a step.", (Line("train/kl", "within the step"),)),
    Panel("Actor loss", "Clipped surrogate loss; its sign and size say little, its jumps do.", (Line("train/actor_loss", "policy"),)),
    Panel("Critic loss", "Half the squared error of the value estimate.", (Line("train/critic_loss", "critic"),)),
    Panel("Explained variance", "How much of the returns' spread the critic foresees: 1 is all of it, 0 is no better than a constant.", (Line("critic/explained_variance", "critic"),)),
    Panel("Entropy", "Spread of the policy's choice of a token, in nats; a fall to 0 ends exploration.", (Line("policy/entropy", "policy"),)),
    Panel("Clipped tokens", "Share of tokens whose ratio has left the clip range, so that they push no further.", (Line("policy/clip_fraction_low", "low"), Line("policy/clip_fraction_high", "high"))),
    Panel("Groups with signal", "Share of the prompts whose answers were rewarded differently. The others teach a group estimator nothing.", (Line("groups/with_signal", "with signal", over="groups/drawn"),), zero_says_nothing=True),
    Panel(
        "Response length",
        "Tokens in a response. Growth without reward is a sign of gaming.",
        (Line("train/avg_response_len", "mean"), Line("response/length_p5", "5 %"), Line("response/length_p95", "95 % quantile"), Line("eval/avg_response_len", "held out", points=True)),
    ),
    Panel("Truncated responses", "Share of responses cut at the length limit.", (Line("response/truncated_fraction", "training"), Line("eval/truncated_fraction", "held out", points=True))),
    Panel("Gradient norm", "Global L2 norm before clipping.", (Line("train/actor_grad_norm", "policy"), Line("train/critic_grad_norm", "critic"), Line("train/grad_norm", "model")), log=True),
    Panel("Learning rate", "As applied by the optimizer.", (Line("train/actor_lr", "policy"), Line("train/critic_lr", "critic"), Line("train/lr", "model")), noisy=False),
    Panel("Generator and learner agree", "Difference between the generator's logprobs and the policy's own, in nats. A rise means wrong weights.", (Line("generator/logprob_gap_mean", "mean"), Line("generator/logprob_gap_max", "largest")), log=True),
    Panel("Throughput", "Tokens per second: response tokens in PPO, tokens read in supervised stages.", (Line("train/tokens_per_second", "tokens/s"),)),
    Panel("Model FLOPs utilisation", "Useful model FLOPs as a percentage of what the devices could do.", (Line("train/mfu_percent", "MFU, %"),)),
    Panel("Idle share of each role", "Share of a step in which no process of the role computes. Roles that take turns are idle while others work.", group="time/idle_share/"),
    Panel("Overhead", "Share of a step in which no role computes at all: calls, transport, the driver's own work.", (Line("time/overhead_s", "overhead", over="time/step_s"),)),
    Panel("Generator workers", "Workers that answered, the most at a time; see jobs.scale.", (Line("pool/generator/workers", "workers"),), noisy=False),
    Panel("Idle share of the pool", "Share of the time in which answers were asked for that the workers had nothing to do, all of them together.", (Line("pool/generator/idle_share", "generator"),)),
    Panel("Waiting prompts", "Prompts that no generator worker had begun to answer, on average: many of them ask for more workers.", (Line("pool/generator/queue_depth", "prompts"),)),
    Panel("Memory", "Resident memory of a role's processes, in GiB.", group="memory/"),
)  # fmt: skip
