"""One call on a bare machine with a GPU: checks, then training until a given second, and weights that come back.

Here, once; and again without `--golden` where weights travel beside it, which leave it little room:

    python tools/accelerator_run.py pack --dataset data/mp_123k --golden ../shared/golden --out shipment

There, in a copy of the checkout with `shipment/`, which git ignores; what comes back is in `--out`, by default $OUT:

    PYTHONPATH=. python3 tools/accelerator_run.py run --shipment shipment --until 540

Here again: a model folder of what came back; `crystallm sample --model runs/accelerated` takes it.

    python tools/accelerator_run.py join DIR --out runs/accelerated

A later call on the same machine goes on by itself, from the checkpoint before the decay in `--work`. Elsewhere it goes
on from what came back, with a new optimiser: lay it into `shipment/back` and add `--resume-from shipment/back`.

The machine needs Python, jax with CUDA, flax, optax, orbax and numpy, and no network. The exit code is 0; 1 where a
check failed (the training was made all the same, and report.json says what) or for an error, in one line; 2 for a wrong
setting; 75 where SIGTERM ended it, with everything saved.
"""

import argparse
import os
import platform
import shlex
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from crystallm_jax.errors import ConfigError, CrystallmError
from crystallm_jax.signals import exit_code

STARTED = time.monotonic()  # what takes long to import comes later
STAGES = ("checks", "training")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    pack = verbs.add_parser("pack", help="make what travels")
    pack.add_argument("--dataset", type=Path, required=True, help="a prepared folder with train and val")
    pack.add_argument("--golden", type=Path, help="the folder of golden files; none are packed without")
    pack.add_argument("--out", type=Path, default=Path("shipment"), help="the shipment (%(default)s)")
    pack.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="over those of the recipe")
    run = verbs.add_parser("run", help="check and train")
    run.add_argument("--shipment", type=Path, default=Path("shipment"), help="what was packed (%(default)s)")
    run.add_argument("--out", type=Path, help="for what comes back ($OUT)")
    run.add_argument("--work", type=Path, help="for what stays there (a folder among the temporary files)")
    run.add_argument("--until", type=float, required=True, help="seconds, from the start of the process")
    run.add_argument("--reserve", type=float, default=20.0, help="of them to write the end (%(default)s)")
    run.add_argument("--decay-share", type=float, default=0.2, help="of the training (%(default)s)")
    run.add_argument("--max-steps", type=int, help="end after so many, of all calls together")
    run.add_argument("--save-every", type=float, default=60.0, help="seconds (%(default)s)")
    run.add_argument("--resume-from", type=Path, help="what came back from an earlier call")
    run.add_argument("--only", choices=STAGES, help="the checks or the training alone")
    join = verbs.add_parser("join", help="make a model folder of what came back")
    join.add_argument("folder", type=Path, metavar="DIR", help="what came back")
    join.add_argument("--out", type=Path, required=True, help="the model folder")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Check and train; returns the exit code."""
    from accelerator_clock import Clock  # noqa: PLC0415  JAX, which the other verbs may do without

    out = options.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    if out is None:
        raise ConfigError("--out is not given, and $OUT is not set: give --out DIR")
    work = options.work or Path(tempfile.gettempdir()) / "crystallm_accelerator"
    clock = Clock(STARTED, options.until, options.reserve, options.decay_share, options.max_steps)
    clock.check()

    import jax  # noqa: PLC0415
    from accelerator_checks import failed, run_checks  # noqa: PLC0415
    from accelerator_parts import Outbox, read_parts  # noqa: PLC0415
    from accelerator_shipment import open_shipment  # noqa: PLC0415
    from accelerator_training import train  # noqa: PLC0415

    from crystallm_jax.model.compiler import use_compilation_cache  # noqa: PLC0415

    shipment = open_shipment(options.shipment, work)
    returned = None if options.resume_from is None else read_parts(options.resume_from)
    use_compilation_cache(str(work / "compiled") if jax.default_backend() != "cpu" else "auto")
    outbox = Outbox(out)
    report: dict[str, Any] = {"dataset": shipment.dataset, "command": _command(), "machine": _machine()}
    if options.only != "training":
        report["checks"] = run_checks(shipment)
        for name, result in report["checks"].items():
            print(f"{name}: {result}", flush=True)
    outbox.write_report(report)
    signalled = None
    if options.only != "checks":
        signalled = train(
            shipment,
            outbox,
            report,
            clock=clock,
            work=work,
            returned=returned,
            save_every=options.save_every,
        )
    if bad := failed(report.get("checks", {})):
        print(f"accelerator_run.py: failed: {', '.join(bad)}: see {out / 'report.json'}", file=sys.stderr)
        return 1
    return 0 if signalled is None else exit_code(signalled)


def _command() -> str:
    return shlex.join(["python", "tools/accelerator_run.py", *sys.argv[1:]])


def _machine() -> dict[str, Any]:
    import jax  # noqa: PLC0415

    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
    }


def main(arguments: list[str] | None = None) -> int:
    """Do what is asked; returns the exit code."""
    options = parse_arguments(arguments)
    try:
        match options.verb:
            case "pack":
                from accelerator_pack import pack  # noqa: PLC0415
                from accelerator_shipment import sizes  # noqa: PLC0415

                pack(options.dataset, options.out, golden=options.golden, overrides=options.settings)
                for name, size in sizes(options.out):
                    print(f"{size:>12,}  {name}")
                return 0
            case "join":
                from accelerator_join import join  # noqa: PLC0415

                card = join(options.folder, options.out)
                print(f"{options.out}: {card.parameters:,} parameters")
                return 0
        return run(options)
    except CrystallmError as error:
        print(f"accelerator_run.py: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
