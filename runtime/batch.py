"""Several texts at once: one step of the model makes the next token of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from rlxc.errors import OptionError
from rlxc.runtime.logits import StepLogits
from rlxc.runtime.model import Ids, Model
from rlxc.runtime.sampling import Sampler, SamplingOptions
from rlxc.runtime.scheduler import AdapterScheduler
from rlxc.runtime.sequence import Stack, Tokens, TokenSequence
from rlxc.runtime.stream import Completion, GrowingText


@dataclass(frozen=True)
class Request:
    """A text to generate in a batch.

    Attributes:
        prompt: text, which gets the model's begin token, or token ids, which are used as they are.
        adapters: names or paths of adapters, with their scales, that take the place of the session's stack; none at all
            is the model as it was compiled. None is the session's stack.
        sampling: how tokens are chosen.
        max_tokens: how many tokens to generate at most.
        stop: strings that end the text; they are not part of it.

    Raises:
        OptionError: ``adapters`` or ``sampling`` is something else.
    """

    prompt: str | Ids
    adapters: Sequence[tuple[str, float]] | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    max_tokens: int = 128
    stop: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        """Checks what Python would accept, but not mean."""
        if not isinstance(self.sampling, SamplingOptions):
            raise OptionError(f"sampling must be SamplingOptions, got {self.sampling!r}", source="request")
        adapters = () if self.adapters is None else self.adapters
        is_list = isinstance(adapters, Sequence) and not isinstance(adapters, str)
        if not is_list or not all(isinstance(entry, tuple) and len(entry) == 2 for entry in adapters):
            raise OptionError(
                f"adapters must be pairs of a name and a scale, got {self.adapters!r}",
                source="request",
                remedy="write adapters=[('name', 1.0)]",
            )


@dataclass(eq=False)
class Job:
    """A request that was found to be possible, and how far it has come."""

    prompt: Tokens
    stack: Stack
    sampler: Sampler
    text: GrowingText
    history: list[int] = field(default_factory=list)  # the prompt, and the tokens chosen
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def completion(self) -> Completion:
        """The text."""
        return self.text.completion(self.prefill_seconds, self.decode_seconds)


def run_batch(model: Model, jobs: Sequence[Job], most: int) -> None:
    """Generate the texts of all jobs, at most ``most`` at once; those with the same adapters together.

    Each prompt is read by itself, then its text gets a token in every step until it ends and another takes its place.

    Raises:
        SessionError: there is not enough memory for the cache of so many sequences.
    """
    scheduler: AdapterScheduler[Job] = AdapterScheduler()
    groups: dict[tuple[str, ...], int] = {}  # by the names of adapters, in the order in which they came
    group_of: dict[Job, int] = {}
    for job in jobs:
        names = tuple(adapter.name for adapter, _ in job.stack)
        group_of[job] = groups.setdefault(names, len(groups))
        if not job.text.has_ended:
            scheduler.submit(job, group_of[job])
    running: dict[Job, TokenSequence] = {}
    while running or len(scheduler):
        while len(running) < most and (batch := scheduler.next_batch(most - len(running))):
            for job in batch:
                sequence = _start(model, job)
                if not job.text.has_ended:
                    running[job] = sequence
        if running:
            # Those with the same adapters are neighbours in the step.
            _step(model, dict(sorted(running.items(), key=lambda item: group_of[item[0]])))
            running = {job: sequence for job, sequence in running.items() if not job.text.has_ended}


def _start(model: Model, job: Job) -> TokenSequence:
    """Read a job's prompt and choose its first token."""
    started = perf_counter()
    sequence = model.new_sequence()
    logits = model.prefill(sequence, job.prompt, job.stack)
    job.history += job.prompt.tolist()
    _choose(job, logits, 0)
    job.prefill_seconds = perf_counter() - started
    return sequence


def _step(model: Model, running: Mapping[Job, TokenSequence]) -> None:
    """Append each job's last token and choose its next one."""
    started = perf_counter()
    last = [job.history[-1] for job in running]
    logits = model.decode(list(running.values()), last, [job.stack for job in running])
    for i, job in enumerate(running):
        _choose(job, logits, i)
    seconds = perf_counter() - started
    for job in running:
        job.decode_seconds += seconds


def _choose(job: Job, logits: StepLogits, sequence: int) -> None:
    choice = job.sampler.sample(logits.row(sequence, 0), job.history)
    job.text.add(choice)
    job.history.append(choice.id)
