"""A batch on a fake engine, with a clock that stands still, and what each of its texts would be alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adapters import random_pairs

from rlxc.artifact import Artifact
from rlxc.errors import ContextError
from rlxc.runtime import Batch, Completion, Event, Request
from rlxc.runtime.batch import Job
from rlxc.runtime.model import Model
from rlxc.runtime.prefix import PrefixCache
from rlxc.runtime.sampling import Choice, Sampler
from rlxc.runtime.sequence import LoadedAdapter, Stack, Tokens, TokenSequence
from rlxc.runtime.stream import GrowingText
from rlxc.runtime.tokenizer import StopMatcher, TextStream, Tokenizer


class Prefixes(PrefixCache):
    """Notes which prompts were begun, in order."""

    def __init__(self, model: Model, budget: int) -> None:
        super().__init__(model, budget)
        self.begun: list[Tokens] = []

    def begin(self, tokens: Tokens, stack: Stack) -> TokenSequence:
        self.begun.append(tokens)
        return super().begin(tokens, stack)


class Bench:
    """A batch on an engine of its own, with a clock that stands still, and all that it told."""

    def __init__(self, artifact: Artifact, tokenizer: Tokenizer, engine: Any, **options: Any) -> None:
        self.engine, self.tokenizer, self.now = engine, tokenizer, 0.0
        self.model = Model(artifact, engine, artifact.start_verification())
        self.prefixes = options.pop("prefixes", Prefixes)(self.model, options.pop("prefix_budget", 0))
        names = {"a": (), "b": (), "c": (9,)}  # token 9 invokes the last one
        self.adapters = {
            name: LoadedAdapter(
                name, artifact.path, f"fingerprint of {name}", engine.prepare(pairs(name)), invocation
            )
            for name, invocation in names.items()
        }
        self.jobs: dict[int, Job] = {}  # each another one than the batch has
        self.prompts: dict[int, Tokens] = {}  # by ticket
        self.cancelled: set[int] = set()
        self.batch = Batch(
            self.model, self.prefixes, self.job, clock=lambda: self.now, **{"max_batch": 4, **options}
        )
        self.events: list[Event] = []

    def job(self, request: Request) -> Job:
        tokens = self.model.tokens(
            self.tokenizer.encode(request.prompt) if isinstance(request.prompt, str) else request.prompt
        )
        stack = tuple((self.adapters[name], scale) for name, scale in request.adapters or ())
        text = GrowingText(
            text=TextStream(self.tokenizer, continuation=True),
            stops=StopMatcher(request.stop),
            eos_ids=self.tokenizer.eos_ids,
            prompt_tokens=len(tokens),
            context=self.model.engine.context,
            max_tokens=request.max_tokens,
            on_full=request.on_full,
        )
        self.newest = Job(tokens, stack, Sampler(request.sampling), text)
        return self.newest

    def submit(self, *requests: Request) -> list[int]:
        tickets = []
        for request in requests:
            tickets.append(self.batch.submit(request))
            self.prompts[tickets[-1]] = self.newest.prompt
            self.jobs[tickets[-1]] = self.job(request)
        return tickets

    def step(self) -> list[Event]:
        events = self.batch.step()
        self.events += events
        return events

    def finish(self) -> None:
        self.events += self.batch.run()

    def check_round(self, running: set[int], most: int, token_budget: int) -> None:
        """Run a round in which the texts that run get a token each, in one step, and prompts what is left."""
        before = len(self.engine.steps)
        events = self.step()
        sizes = [(len(m), s) for m, s in zip(self.engine.mixes[before:], self.engine.steps[before:])]
        given = [event.ticket for event in events if event.piece is not None]
        assert len(given) == len(set(given)) and running <= set(given)
        if running:
            assert sizes.pop(0) == (len(running), 1)
        assert all(sequences == 1 for sequences, _ in sizes)
        assert sum(tokens for _, tokens in sizes) <= token_budget
        assert len(self.open() & set(self.begun())) <= most

    def open(self) -> set[int]:
        """The requests of whose end nothing is known."""
        ended = {event.ticket for event in self.events if event.completion is not None}
        return self.jobs.keys() - ended - self.cancelled

    def begun(self) -> list[int]:
        """The requests whose prompts were begun, in this order."""
        tickets = {id(prompt): ticket for ticket, prompt in self.prompts.items()}
        return [tickets[id(prompt)] for prompt in self.prefixes.begun]

    def ids(self, ticket: int) -> list[int]:
        return [e.piece.id for e in self.events if e.ticket == ticket and e.piece is not None]

    def end(self, ticket: int) -> Event:
        """The one last event of a request, which has all of its pieces."""
        (end,) = (event for event in self.events if event.ticket == ticket and event.completion is not None)
        assert end.piece is None
        assert end.completion is not None and end.completion.ids == self.ids(ticket)
        assert [event for event in self.events if event.ticket == ticket][-1] is end
        return end

    def completion(self, ticket: int) -> Completion:
        """The text of a request that ended without an error."""
        end = self.end(ticket)
        assert end.error is None and end.completion is not None
        return end.completion

    def alone(self, ticket: int) -> Event:
        """The end of a request's text if there were no other: a token in every step."""
        job, sequence = self.jobs[ticket], self.model.new_sequence()
        if job.text.has_ended:
            return Event(ticket, completion=job.completion())
        logits = self.model.prefill(sequence, job.prompt, job.stack)
        history = job.prompt.tolist()
        while True:
            choice: Choice = job.sampler.sample(logits.row(0, 0), history)
            history.append(choice.id)
            job.text.add(choice)
            if job.text.has_ended:
                return Event(ticket, completion=job.completion())
            try:
                job.text.check_room()
            except ContextError as error:
                return Event(ticket, completion=job.completion(), error=error)
            logits = self.model.decode([sequence], [choice.id], [job.stack])


MakeBench = Callable[..., Bench]


def bench_maker(artifact: Artifact, engine_type: type[Any]) -> MakeBench:
    """``make_bench(engine, max_batch=..., ...)``: a bench on this engine, or on one of the type."""
    facts = artifact.manifest.tokenizer
    tokenizer = Tokenizer(artifact.file("tokenizer.json"), bos_id=facts.bos_id, eos_ids=facts.eos_ids)
    return lambda engine=None, **options: Bench(artifact, tokenizer, engine or engine_type(), **options)


def pairs(name: str) -> Any:
    return random_pairs({"blk.0.attn_q.weight": (8, 4)}, 4, seed=ord(name), size=0.1)


def facts(completion: Completion | None) -> tuple[Any, ...]:
    """All but the times."""
    assert completion is not None
    return (
        completion.text,
        completion.ids,
        completion.logprobs,
        completion.prompt_tokens,
        completion.stop_reason,
    )
