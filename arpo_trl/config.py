from dataclasses import dataclass, field

from trl import GRPOConfig

from .advantages import attribution
from .protocols import protocol_class
from .rollout.rules import branch_rule

ROLLOUT_SCHEDULES = ("waves", "eager", "continuous")
BRANCH_MEASURES = ("entropy", "novelty")
FORK_SAMPLINGS = ("independent", "distinct", "weighted")
ROLLOUT_DTYPES = ("bfloat16", "float16", "float32")


@dataclass
class ARPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`ARPOTrainer`].

    It inherits every parameter of [`~trl.GRPOConfig`] and adds those of Agentic Reinforced Policy Optimization
    ([ARPO](https://huggingface.co/papers/2507.19849)). Symbols in parentheses are the paper's.

    Parameters:
        > Parameters that control branching

        num_initial_generations (`int`, *optional*, defaults to `8`):
            Trajectories sampled from the prompt at the start (N). The other `num_generations -
            num_initial_generations` rows of a group (M − N) are forks, or supplements from the prompt where too few
            forks were made. Equal to `num_generations`, it turns branching off: what is left is GRPO. Forks save tool
            calls and sampled tokens. With transformers' `generate` and few rows they save no time, since a rollout
            with forks takes more waves, each of fewer rows.
        branch_factor (`int`, *optional*, defaults to `1`):
            Forks made by one positive decision (Z).
        entropy_window (`int`, *optional*, defaults to `20`):
            Tokens after a tool result over which the entropy is read (k).
        branch_probability (`float`, *optional*, defaults to `0.5`):
            Base probability of a fork (α).
        entropy_weight (`float`, *optional*, defaults to `0.2`):
            Weight of the entropy gap in the probability of a fork (β): P = clip(α + β·ΔH, 0, 1).
        branch_threshold (`float`, *optional*, defaults to `0.5`):
            Probability above which the rule `"threshold"` forks (τ). The other rules ignore it.
        branch_rule (`str`, *optional*, defaults to `"bernoulli"`):
            `"bernoulli"` forks with probability P, `"threshold"` forks if P > τ, `"random"` forks with probability α
            whatever the entropy (the control). `"expansion"` lets all rows end first and then shares the missing ones
            out over the tool results (and the prompt) of the whole group, in proportion to the entropy read there for
            each tool call that a row from there costs, after [AT²PO](https://huggingface.co/papers/2601.04767): fewer
            tool calls, above all with few initial rows, for a rollout that takes longer. `"random_expansion"` draws
            these nodes at random, as in [Tree-GRPO](https://huggingface.co/papers/2509.21240). `"contrast"` scores
            the rows before it shares the missing ones out, and prefers nodes from which rows are likely to end
            differently, after [BranPO](https://huggingface.co/papers/2602.03719); a group whose rows have all earned
            the same gets no more. It needs reward functions that score each row by itself. These three ignore α, β,
            τ and Z. `"my_module:MyRule"`: a subclass of [`~arpo_trl.rollout.rules.BranchRule`] of your own.
        expansion_rounds (`int`, *optional*, defaults to `2`):
            Rounds in which `"expansion"`, `"random_expansion"` and `"contrast"` fill a group; the second round can
            fork from the rows of the first.
        branch_measure (`str`, *optional*, defaults to `"entropy"`):
            What decides where to fork. `"entropy"`: that of the first tokens after a tool result, as in the papers.
            `"novelty"`: the probability that a fork differs, 1 − p, with p the probability of the segments that were
            sampled there. With the rules `"bernoulli"` and `"threshold"` it is P; with `"expansion"` it stands in
            place of the entropy. The rules of chance are as they are.
        fork_sampling (`str`, *optional*, defaults to `"independent"`):
            `"independent"`: the first segment of a fork is what the model samples, often that of its parent again.
            `"distinct"`: it is sampled anew, at most `fork_tries` times in all, until nothing that was sampled at its
            node equals it; what is thrown away costs tokens and no call. `"weighted"`: the same, with the weights of
            [Kool et al.](https://huggingface.co/papers/2002.06043) on the advantages, which keep the expectation of
            the gradient where the number of forks at a node does not depend on what was sampled there.
        fork_tries (`int`, *optional*, defaults to `6`):
            Times that a fork is sampled at most with `fork_sampling="distinct"` or `"weighted"`.
        max_environment_states (`int`, *optional*, defaults to `256`):
            Copies of stateful environments that a process keeps during a rollout, so that `"expansion"` and
            `"random_expansion"` can fork where a row has been. Beyond that, those go first before which the fewest
            calls stand; a fork from there starts from the prompt. The other rules keep none.

        > Parameters that control the advantage

        advantage_attribution (`str`, *optional*, defaults to `"soft"`):
            `"soft"`: every token of a row has the row's advantage. `"hard"`: a token shared by several rows has the
            mean of their advantages. `"tree"`: as hard, less half of what it was before the fork that led to the
            token, so that a branch is also compared with its siblings
            ([TreeRL](https://huggingface.co/papers/2506.11902)). `"my_module:my_attribution"`: a function of your own
            like [`~arpo_trl.advantages.hard_advantages`].

        dynamic_sampling (`bool`, *optional*, defaults to `False`):
            Whether groups all of whose rows have earned the same are taken out of the loss, as in
            [DAPO](https://huggingface.co/papers/2503.14476). Their advantages are 0; without them, a loss that is a
            mean over tokens (`loss_type="dapo"`) is one over the tokens that teach something. They are not replaced
            by other prompts: a batch has the size that it has.

        > Parameters that control tools

        tool_protocol (`str`, *optional*, defaults to `"chat_template"`):
            How the model calls a tool and reads its result. `"chat_template"`: the tokenizer's chat template, as in
            [`~trl.GRPOTrainer`]. `"tags"`: the format of the paper's data and checkpoints,
            `<tool>…</tool><result>…</result>` within one assistant turn. `"my_module:MyProtocol"`: a subclass of
            [`~arpo_trl.protocols.ToolProtocol`] of your own.
        max_tool_concurrency (`int`, *optional*, defaults to `64`):
            Synchronous tool calls that run at the same time on one process.
        tool_timeout (`float`, *optional*, defaults to `120.0`):
            Seconds after which a tool call is given up; the model reads that it timed out. A tool's own time-out
            ([`~arpo_trl.tools.tool`]) comes first.
        rollout_schedule (`str`, *optional*, defaults to `None`):
            `"waves"`: the rows of a rollout wait for each other's tools after each segment, so that a seed repeats a
            rollout. `"eager"`: rows whose tools are done go on at once, in smaller batches; for tools whose time
            varies much. `"continuous"`: each row goes on as soon as its own tools are done, whatever the other rows
            and the other processes do; with vLLM the engine samples without a pause, with transformers what is ready
            is a batch. Not for an engine that several processes share (FSDP, ZeRO-3, `vllm_tensor_parallel_size`
            above 1). By default `"continuous"` with vLLM, where it can be, and `"waves"` otherwise.
        rollout_deadline (`float`, *optional*, defaults to `None`):
            Seconds that a training rollout may take, with the schedule `"continuous"`. Rows that go on then end where
            they are, as truncated ones, without the segment that they sample or the calls that they wait for; a row
            that has not begun has one token that the loss leaves out. Transformers looks at the clock between two
            batches. By default a rollout takes what it takes.
        rollout_finished_fraction (`float`, *optional*, defaults to `1.0`):
            Fraction of a process's rows after whose end the others are ended like those at the deadline, so that few
            stragglers do not hold up a training rollout; with the schedule `"continuous"`. Rows that are cut are the
            long ones: train with `mask_truncated_completions=True` or rewards that know of it. 1 waits for all.

        > Parameters that control prefix sharing

        prefix_sharing (`bool`, *optional*, defaults to `True`):
            Whether tokens that rows share are computed once rather than once a row: in the training step where that is
            supported and pays, and in rollouts with transformers, whose keys and values are kept while tools run.
            Log-probabilities and gradients are the same up to rounding, and all log-probabilities of a batch that are
            compared with each other are computed in one way. Rows that share a prefix are brought into one
            micro-batch, except where the loss depends on which rows a micro-batch holds (`loss_type="bnpo"`,
            `top_entropy_quantile` < 1, the entropy bonus). Set it to `False` for results that equal TRL's to the bit.
        keep_groups_together (`bool`, *optional*, defaults to `False`):
            Whether the shuffle of a generation batch deals whole groups, rather than rows, to optimiser steps and
            micro-batches, so that more prefixes can be shared; a group that does not fit is cut along its tree. Where
            a generation batch is one optimiser step and the loss does not depend on which rows a micro-batch holds,
            the rows of a step are the same without it, and prefix sharing brings groups together anyway. Elsewhere it
            changes training: each row is still equally likely to be in each step, but a step sees fewer prompts.
        micro_batches_by_tokens (`bool`, *optional*, defaults to `False`):
            Whether the rows of an optimiser step are cut into its `gradient_accumulation_steps` micro-batches by the
            tokens that the model computes, those that rows share counted once, rather than into
            `per_device_train_batch_size` rows each. The largest micro-batch, which decides on memory, is then smaller
            where rows differ in length. The loss of the step is the same. It needs `prefix_sharing`, since rows that
            are padded to one length cost the same, and a loss that does not depend on which rows a micro-batch holds.

        > Parameters that control generation with transformers

        rollout_dtype (`str`, *optional*, defaults to `None`):
            Data type of a copy of the weights that samples the rollouts: `"bfloat16"`, `"float16"` or `"float32"`.
            With `None` the model itself samples. On a CPU that computes in bfloat16, a copy in it samples faster;
            autocast (`bf16=True`) does not, since it casts the weights again for every token. Log-probabilities of
            the update stay the model's own, so the tokens are those of a slightly other policy, as they are with
            vLLM. The copy is made for each rollout and takes its memory while that lasts.

        > Parameters that control generation with vLLM

        vllm_entropy_top_k (`int`, *optional*, defaults to `20`):
            Most likely tokens that vLLM returns at each position whose entropy is read; it is read from them, with the
            remaining mass spread evenly over the rest of the vocabulary. `vllm serve` allows up to its
            `--max-logprobs`.

        > Parameters that control logging

        log_rollouts (`bool`, *optional*, defaults to `False`):
            Whether to write training rollouts to `<output_dir>/rollouts/step-<step>.jsonl.gz`.
        log_rollout_steps (`int`, *optional*, defaults to `1`):
            Steps between two whose rollouts are written.
        log_rollout_groups (`int`, *optional*, defaults to `None`):
            Groups of a generation batch, those of all processes counted, of which the rollouts are written, drawn at
            random. By default all.
        log_tree_steps (`int`, *optional*, defaults to `0`):
            Steps between two pictures of a group's tree, written to `<output_dir>/trees/step-<step>.png` and logged to
            TensorBoard, trackio and Weights & Biases, whichever `report_to` names. 0 draws none.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`]:
    > - `num_generations`: Defaults to `16` instead of `8`.
    > - `per_device_train_batch_size` and `per_device_eval_batch_size`: Default to `16` instead of `8`, so that one
    >   group fits.
    """

    num_generations: int = field(
        default=16,
        metadata={"help": "Completions per prompt: the group (M in the ARPO paper), always exactly this many rows."},
    )
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Batch size per device for training, in completions."}
    )
    per_device_eval_batch_size: int = field(
        default=16, metadata={"help": "Batch size per device for evaluation, in completions."}
    )

    # Parameters that control branching
    num_initial_generations: int = field(
        default=8,
        metadata={
            "help": "Trajectories sampled from the prompt at the start (N in the ARPO paper). Equal to "
            "`num_generations`, it turns branching off."
        },
    )
    branch_factor: int = field(default=1, metadata={"help": "Forks made by one positive decision (Z)."})
    entropy_window: int = field(
        default=20, metadata={"help": "Tokens after a tool result over which the entropy is read (k)."}
    )
    branch_probability: float = field(default=0.5, metadata={"help": "Base probability of a fork (alpha)."})
    entropy_weight: float = field(
        default=0.2, metadata={"help": "Weight of the entropy gap in the probability of a fork (beta)."}
    )
    branch_threshold: float = field(
        default=0.5, metadata={"help": "Probability above which the rule 'threshold' forks (tau)."}
    )
    branch_rule: str = field(
        default="bernoulli",
        metadata={
            "help": "When to fork: 'bernoulli' with probability P, 'threshold' if P > tau, 'random' with probability "
            "alpha whatever the entropy (the control). 'expansion' once all rows have ended, anywhere in the group, "
            "in proportion to the entropy per tool call; 'random_expansion' anywhere at random; 'contrast' where rows "
            "are likely to end differently. Or a class of your own: 'my_module:MyRule'."
        },
    )
    expansion_rounds: int = field(
        default=2,
        metadata={"help": "Rounds in which the rules 'expansion', 'random_expansion' and 'contrast' fill a group."},
    )
    branch_measure: str = field(
        default="entropy",
        metadata={
            "help": "What decides where to fork: 'entropy', or 'novelty', the probability that a fork differs.",
            "choices": list(BRANCH_MEASURES),
        },
    )
    fork_sampling: str = field(
        default="independent",
        metadata={
            "help": "'independent'; 'distinct' samples a fork until it differs from what was sampled at its node; "
            "'weighted' also gives the rows the weights that keep the expectation of the gradient.",
            "choices": list(FORK_SAMPLINGS),
        },
    )
    fork_tries: int = field(default=6, metadata={"help": "Times that a fork is sampled at most until it differs."})
    max_environment_states: int = field(
        default=256,
        metadata={
            "help": "Copies of stateful environments that a process keeps during a rollout for forks of the rules "
            "'expansion' and 'random_expansion'."
        },
    )

    # Parameters that control the advantage
    advantage_attribution: str = field(
        default="soft",
        metadata={
            "help": "'soft': every token of a row has the row's advantage. 'hard': a token shared by several rows has "
            "the mean of their advantages. 'tree': that, less half of what it was before the fork that led there. Or "
            "a function of your own: 'my_module:my_attribution'."
        },
    )

    dynamic_sampling: bool = field(
        default=False,
        metadata={"help": "Whether groups all of whose rows have earned the same are taken out of the loss."},
    )

    # Parameters that control tools
    tool_protocol: str = field(
        default="chat_template",
        metadata={
            "help": "How the model calls a tool and reads its result: 'chat_template' (the tokenizer's, as in "
            "GRPOTrainer), 'tags' (<tool>...</tool><result>...</result>, the format of the paper's data) or a class "
            "of your own ('my_module:MyProtocol')."
        },
    )
    max_tool_concurrency: int = field(
        default=64, metadata={"help": "Synchronous tool calls that run at the same time on one process."}
    )
    tool_timeout: float | None = field(
        default=120.0,
        metadata={"help": "Seconds after which a tool call is given up; the model reads that it timed out."},
    )

    rollout_schedule: str | None = field(
        default=None,
        metadata={
            "help": "'waves': rows wait for each other's tools after each segment, so that a seed repeats a rollout. "
            "'eager': rows whose tools are done go on at once, in smaller batches. 'continuous': each row goes on as "
            "soon as its own tools are done. By default 'continuous' with vLLM where it can be, otherwise 'waves'.",
            "choices": list(ROLLOUT_SCHEDULES),
        },
    )
    rollout_deadline: float | None = field(
        default=None,
        metadata={
            "help": "Seconds that a training rollout may take, with the schedule 'continuous'; rows that go on then "
            "end as truncated ones."
        },
    )
    rollout_finished_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Fraction of a process's rows after whose end the others are ended, with the schedule "
            "'continuous'. 1 waits for all."
        },
    )

    # Parameters that control prefix sharing
    prefix_sharing: bool = field(
        default=True,
        metadata={
            "help": "Whether tokens that rows share are computed once rather than once a row, in rollouts and in the "
            "training step, where that is supported and pays."
        },
    )
    keep_groups_together: bool = field(
        default=False,
        metadata={
            "help": "Whether the shuffle of a generation batch deals whole groups, rather than rows, to optimiser "
            "steps and micro-batches."
        },
    )
    micro_batches_by_tokens: bool = field(
        default=False,
        metadata={
            "help": "Whether the rows of an optimiser step are cut into micro-batches by the tokens to compute, "
            "rather than into as many rows each."
        },
    )

    # Parameters that control generation with transformers
    rollout_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Data type of a copy of the weights that samples the rollouts; by default the model itself does. "
            "On a CPU 'bfloat16' samples faster.",
            "choices": list(ROLLOUT_DTYPES),
        },
    )

    # Parameters that control generation with vLLM
    vllm_entropy_top_k: int = field(
        default=20,
        metadata={"help": "Most likely tokens that vLLM returns at each position, to read the entropy from."},
    )

    # Parameters that control logging
    log_rollouts: bool = field(
        default=False,
        metadata={"help": "Whether to write training rollouts to <output_dir>/rollouts/step-<step>.jsonl.gz."},
    )
    log_rollout_steps: int = field(default=1, metadata={"help": "Steps between two whose rollouts are written."})
    log_rollout_groups: int | None = field(
        default=None,
        metadata={
            "help": "Groups of a generation batch, those of all processes counted, of which the rollouts are written, "
            "drawn at random. By default all."
        },
    )
    log_tree_steps: int = field(
        default=0,
        metadata={
            "help": "Steps between two pictures of a group's tree, written to <output_dir>/trees/step-<step>.png and "
            "logged to TensorBoard, trackio and Weights & Biases. 0 draws none."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_initial_generations < 1:
            raise ValueError(
                f"`num_initial_generations` is {self.num_initial_generations}; at least one trajectory must start "
                "from the prompt. Set it to 1 or more."
            )
        if self.num_initial_generations > self.num_generations:
            raise ValueError(
                f"`num_initial_generations` ({self.num_initial_generations}) is larger than `num_generations` "
                f"({self.num_generations}), which counts all rows of a group. Lower the former (half of the group is "
                "usual) or raise the latter."
            )
        for name, minimum in (
            ("branch_factor", 1),
            ("entropy_window", 1),
            ("expansion_rounds", 1),
            ("fork_tries", 1),
            ("max_environment_states", 1),
            ("max_tool_concurrency", 1),
            ("vllm_entropy_top_k", 1),
            ("log_tree_steps", 0),
            ("log_rollout_steps", 1),
        ):
            if getattr(self, name) < minimum:
                raise ValueError(f"`{name}` is {getattr(self, name)}; set it to {minimum} or more.")
        if self.micro_batches_by_tokens:
            self._check_micro_batches()
        if self.log_rollout_groups is not None and self.log_rollout_groups < 1:
            raise ValueError(
                f"`log_rollout_groups` is {self.log_rollout_groups}; set it to 1 or more, or to None to write all "
                "groups; `log_rollouts=False` writes none."
            )
        if not self.entropy_weight >= 0:
            raise ValueError(f"`entropy_weight` is {self.entropy_weight}; set it to 0 (ignore the entropy) or more.")
        for name in ("branch_probability", "branch_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it is a probability: set it between 0 and 1.")
        if self.tool_timeout is not None and not self.tool_timeout > 0:
            raise ValueError(
                f"`tool_timeout` is {self.tool_timeout}; set it to seconds above 0, or None to wait for ever."
            )
        if self.rollout_dtype not in (None, *ROLLOUT_DTYPES):
            raise ValueError(
                f"`rollout_dtype` is {self.rollout_dtype!r}; set it to None or to one of "
                f"{', '.join(map(repr, ROLLOUT_DTYPES))}."
            )
        if self.rollout_dtype is not None and self.use_vllm:
            raise ValueError(
                f"`rollout_dtype` is {self.rollout_dtype!r}, but with `use_vllm` the engine samples with its own "
                "weights: leave it out."
            )
        protocol_class(self.tool_protocol)
        branch_rule(self.branch_rule, self)
        attribution(self.advantage_attribution)
        for name, choices in (
            ("branch_measure", BRANCH_MEASURES),
            ("fork_sampling", FORK_SAMPLINGS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}; set it to one of {', '.join(map(repr, choices))}."
                )
        if self.rollout_schedule not in (None, *ROLLOUT_SCHEDULES):
            raise ValueError(
                f"`rollout_schedule` is {self.rollout_schedule!r}; set it to one of "
                f"{', '.join(map(repr, ROLLOUT_SCHEDULES))}, or leave it out."
            )
        if self.rollout_deadline is not None and not self.rollout_deadline > 0:
            raise ValueError(
                f"`rollout_deadline` is {self.rollout_deadline}; set it to seconds above 0, or None for no deadline."
            )
        if not 0 < self.rollout_finished_fraction <= 1:
            raise ValueError(
                f"`rollout_finished_fraction` is {self.rollout_finished_fraction}; it is a fraction of the rows: set "
                "it above 0 and to no more than 1, which waits for all."
            )

    def _check_micro_batches(self) -> None:
        """Refuse `micro_batches_by_tokens` where rows may not change their micro-batch, or gain nothing from it."""
        for name, fits in (
            ("prefix_sharing", self.prefix_sharing),
            ("loss_type", self.loss_type != "bnpo"),
            ("top_entropy_quantile", self.top_entropy_quantile == 1.0),
            ("entropy_coef", self.entropy_coef == 0.0),
            ("use_adaptive_entropy", not self.use_adaptive_entropy),
            ("use_liger_kernel", not self.use_liger_kernel),
        ):
            if not fits:
                raise ValueError(
                    f"`micro_batches_by_tokens` does not go with `{name}={getattr(self, name)!r}`: rows have to be "
                    "scored packed, with a loss that does not depend on which rows a micro-batch holds. Leave one of "
                    "them out."
                )
