"""The ``rlxc`` command. Results go to stdout; progress, notes and errors go to stderr.

Exit codes: 0 done, 1 an error that rlxc or the system reports, 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import io
import os
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

import rlxc
from rlxc.artifact import DEFAULT_MAX_RANK, DEFAULT_ROLLBACK, Activations, BackendName, KvCacheType
from rlxc.cli.adapters import FoldTo, Lora, LoraModeOption, Quantize, parse_adapters
from rlxc.cli.bench import bench
from rlxc.cli.compare import compare, fold_report
from rlxc.cli.formats import formats
from rlxc.cli.inspecting import inspect
from rlxc.cli.merge import merge
from rlxc.cli.models import DEFAULT_CONTEXT, ModelContext, Runnable, Threads, artifact_of
from rlxc.cli.speculation import Speculate, check_drafter, drafter_of
from rlxc.cli.terminal import (
    in_one_line,
    lines,
    loss_lines,
    megabytes,
    note,
    progress_bars,
    rate,
    show,
)
from rlxc.cli.tune import tune
from rlxc.errors import ArtifactError, ContextError, RlxcError, SessionError

if TYPE_CHECKING:
    from rlxc.runtime import Session

# Other modules are imported by the commands that need them: `rlxc --help` should not wait for a compiler.


class _Commands(TyperGroup):
    """Runs a command and turns the errors it reports into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            raise  # whoever read the output has seen enough: typer ends quietly
        except (RlxcError, OSError) as error:
            if ctx.params["debug"]:
                raise
            note(f"error: {in_one_line(error)}")
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            note("interrupted")
            raise typer.Exit(130) from None
        return result


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="A .gguf file or a Hugging Face folder.", show_default=False),
]
Context = Annotated[
    int | None,
    typer.Option("--context", min=1, help="Tokens that the KV cache holds.", show_default=DEFAULT_CONTEXT),
]
KvCache = Annotated[
    KvCacheType,
    typer.Option("--kv-cache", help="What keys and values are kept as; auto is the backend's choice."),
]
Trace = Annotated[bool, typer.Option("--trace", help="Say on stderr what each pass did, and why not.")]
MaxTokens = Annotated[int, typer.Option("-n", "--max-tokens", min=1, help="Most tokens to generate.")]
Temperature = Annotated[
    float, typer.Option("--temp", min=0, help="Temperature; 0 always takes the best token.")
]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Choose among the k best tokens; 0 among all.")]
TopP = Annotated[
    float, typer.Option("--top-p", min=0, max=1, help="... among the best with this probability in sum.")
]
MinP = Annotated[
    float, typer.Option("--min-p", min=0, max=1, help="... among those this fraction as likely as the best.")
]
Penalty = Annotated[
    float, typer.Option("--repetition-penalty", min=0.01, help="Above 1 makes repetition less likely.")
]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, help="Makes sampling repeatable.", show_default="random")
]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="Stop before this text; may be given several times.")
]
WhenFull = Annotated[
    Literal["stop", "error"],
    typer.Option("--on-full", help="At the end of the context: stop there, or an error."),
]


def main() -> None:
    """Run the command line and exit with its code."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What a terminal cannot show, or sends as broken UTF-8, is no reason to stop.
            stream.reconfigure(errors="replace")
    app(prog_name="rlxc")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"rlxc {rlxc.__version__}", flush=True)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Compile language models into self-contained artifacts, and run them."""


@app.command("compile")
def _compile(
    model: Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The artifact to write.", show_default=False)
    ],
    backend: Annotated[
        BackendName | None,
        typer.Option(help="What the artifact runs on; tvm if it is installed.", show_default=False),
    ] = None,
    target: Annotated[
        str, typer.Option(help="The CPUs it runs on, with commas between; native is this one.")
    ] = "native",
    activations: Annotated[
        Activations, typer.Option(help="int8 is fast, float32 the exact reference.")
    ] = "int8",
    context: Context = None,
    kv_cache: KvCache = "auto",
    rollback: Annotated[
        int, typer.Option(min=0, help="The newest tokens that can be taken back, whatever a layer's window.")
    ] = DEFAULT_ROLLBACK,
    lora: Lora = None,
    lora_mode: LoraModeOption = "auto",
    lora_rank: Annotated[
        int, typer.Option(min=1, help="The most ranks of all adapters that a text uses together.")
    ] = DEFAULT_MAX_RANK,
    fold_to: FoldTo = None,
    quantize: Quantize = "none",
    report: Annotated[
        bool,
        typer.Option(
            "--report", help="Measure how far predictions are from those with the adapters unfolded."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that is there.")] = False,
    trace: Trace = False,
) -> None:
    """Compile a model into an artifact.

    \b
    Example:
      rlxc compile gemma-3-270m.gguf -o gemma.rlx --context 8192 --kv-cache int8
      rlxc compile gemma-3-270m.gguf -o gemma.rlx --lora style.gguf:0.8 --lora-mode split
      rlxc compile SmolLM2-135M/ -o smol.rlx --quantize q4_k
    """
    adapters = parse_adapters(lora)
    if report and (not adapters or lora_mode == "split"):
        raise typer.BadParameter("there is nothing to fold", param_hint="--report")
    if os.path.lexists(output) and not force:
        raise ArtifactError(
            "exists already", source=output, remedy="replace it with --force, or give another path"
        )
    from rlxc.compiler import read_losses

    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as warned, progress_bars() as progress:
        warnings.simplefilter("always", UserWarning)
        artifact = rlxc.compile(
            model,
            output,
            backend=backend,
            target=target,
            activations=activations,
            context=context,
            kv_cache=kv_cache,
            rollback=rollback,
            adapters=adapters,
            lora=lora_mode,
            lora_rank=lora_rank,
            fold_to=fold_to,
            quantize=quantize,
            overwrite=force,
            progress=progress,
            trace=note if trace else None,
        )
    size = sum(entry.size for entry in artifact.manifest.files.values())
    context = artifact.manifest.options.context
    print(f"{output}: {megabytes(size)}, context {context}, in {time.perf_counter() - started:.1f} s")
    for warning in warned:
        note(f"warning: {warning.message}")
    for line in loss_lines(read_losses(artifact)):
        note(line)
    if report:
        same = {"backend": backend, "target": target, "activations": activations, "quantize": quantize}
        note(fold_report(artifact, model, adapters, **same))
    for library in artifact.manifest.target.libraries:
        untuned = library.problems - library.tuned
        if untuned:
            note(
                f"{library.target}: {untuned} of {library.problems} kernels and shapes have no tuning results and use "
                f"the defaults; to measure them: rlxc tune {model}"
            )


@app.command("run")
def _run(
    model: Runnable,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The text to go on from.", show_default=False)
    ],
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    lora: Lora = None,
    speculate: Speculate = None,
    on_full: WhenFull = "stop",
    stats: Annotated[bool, typer.Option("--stats", help="Print token counts and speed to stderr.")] = False,
    threads: Threads = None,
    context: ModelContext = None,
) -> None:
    """Continue a text.

    \b
    Example:
      rlxc run gemma.rlx "The capital of France is" -n 32 --temp 0.7 --top-p 0.9
      rlxc run gemma.rlx "Q: Why is the sky blue? A:" --lora style.gguf:0.8
      rlxc run gemma.rlx "[1, 2, 3, 4, 5, 6, 7], [1, 2, 3," --speculate ngram --stats
    """
    adapters = parse_adapters(lora)
    check_drafter(speculate)
    artifact = artifact_of(model, context, adapters=bool(adapters))
    started = time.perf_counter()
    with ExitStack() as closing:
        session = closing.enter_context(rlxc.load(artifact, threads=threads))
        drafter = drafter_of(speculate, session, threads, closing)
        for path, scale in adapters:
            session.adapters.push(path, scale)
        ids = session.tokenizer.encode(prompt)
        loaded = time.perf_counter()
        completion = show(
            session.stream(
                ids,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
                stop=stop or (),
                speculate=drafter,
                on_full=on_full,
            )
        )
    if stats:
        count = len(completion.ids)
        note(f"load: {loaded - started:.2f} s")
        note(f"prompt: {len(ids)} tokens, {rate(len(ids), completion.prefill_seconds)}")
        note(f"generated: {count} tokens, {rate(count - 1, completion.decode_seconds)}")
        if speculate is not None:
            note(f"speculation: {completion.accepted} of {completion.drafted} guessed tokens were right")


@app.command("chat")
def _chat(
    model: Runnable,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    speculate: Speculate = None,
    threads: Threads = None,
    context: ModelContext = None,
) -> None:
    """Talk with a model, a line at a time; /reset starts anew, /exit or Ctrl-D ends.

    \b
    Example:
      rlxc chat gemma.rlx --temp 0.7
      echo "Name three colours." | rlxc chat gemma.rlx
    """
    check_drafter(speculate)
    with ExitStack() as closing:
        session = closing.enter_context(rlxc.load(artifact_of(model, context), threads=threads))
        drafter = drafter_of(speculate, session, threads, closing)
        if session.chat_template is None:
            remedy = 'let it go on from a text: rlxc run MODEL "text"'
            raise SessionError("the model has no chat template", source=model, remedy=remedy)
        messages: list[dict[str, str]] = []
        for line in lines():
            if line == "/exit":
                break
            if line == "/reset":
                messages.clear()
                continue
            messages.append({"role": "user", "content": line})
            try:
                stream = session.stream(
                    _prompt_ids(session, session.chat_template.render(messages)),
                    max_tokens=max_tokens,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    min_p=min_p,
                    repetition_penalty=repetition_penalty,
                    seed=seed,
                    stop=stop or (),
                    speculate=drafter,
                )
            except ContextError as error:
                full = f"the conversation no longer fits the context of {session.context} tokens"
                if not sys.stdin.isatty():
                    raise ContextError(full, source=model, remedy="send /reset to start anew") from error
                note(f"{full}; /reset starts anew")
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": show(stream).text})


@app.command("graph")
def _graph(
    model: Model,
    after: Annotated[
        str | None, typer.Option(metavar="PASS", help="Stop after this pass.", show_default="the last one")
    ] = None,
    context: Context = None,
    kv_cache: KvCache = "auto",
    lora: Lora = None,
    lora_mode: LoraModeOption = "auto",
    fold_to: FoldTo = None,
    quantize: Quantize = "none",
    trace: Trace = False,
) -> None:
    """Print the graph of a model as IR text; with adapters, what becomes of each matrix, and why, stands above it.

    \b
    Example:
      rlxc graph gemma-3-270m.gguf --after fuse_qkv
      rlxc graph gemma-3-270m.gguf --lora style.gguf
    """
    from rlxc.compiler import lower

    text = lower(
        model,
        context=context,
        kv_cache=kv_cache,
        adapters=parse_adapters(lora),
        lora=lora_mode,
        fold_to=fold_to,
        quantize=quantize,
        after=after,
        trace=note if trace else None,
    )
    print(text, end="")


app.command("bench")(bench)
app.command("compare")(compare)
app.command("formats")(formats)
app.command("inspect")(inspect)
app.command("merge")(merge)
app.command("tune")(tune)


def _prompt_ids(session: Session, prompt: str) -> list[int]:
    """The ids of a rendered conversation: most templates write the begin token themselves, once is enough."""
    tokenizer = session.tokenizer
    begun = tokenizer.bos_id is not None and prompt.startswith(tokenizer.piece(tokenizer.bos_id))
    return tokenizer.encode(prompt, add_special=not begun)
