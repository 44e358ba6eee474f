"""Run a job of this checkout on a Ray cluster, show how it goes, and end as it ends.

python jobs/submit.py jobs/train_bct.py --config configs/tiny.yaml      submit it, or follow the one that runs
python jobs/submit.py --detach jobs/train_bct.py ...                    submit it, and do not wait
python jobs/submit.py --stop jobs/train_bct.py ...                      have it save and end

Options of this job come before the submitted one's name. Where the cluster is: --address, or RAY_ADDRESS; its token:
RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH. An attempt has the id NAME-NUMBER; the next one goes on from the last one's
checkpoint. Ctrl-C leaves the job alone. Exit code: the job's own; 75: it was stopped, and the same command goes on.
"""

from __future__ import annotations

import argparse
import sys

FOLLOWS = "the job goes on: the same command follows it again, and with --stop ends it"


def submit(arguments: argparse.Namespace) -> int:
    """Submit, stop, follow; the job's exit code."""
    from pipeline.console import say
    from pipeline.errors import ConfigError
    from pipeline.following import follow
    from pipeline.submission import Submitter, code_of, entrypoint, name_of

    command = entrypoint([arguments.job, *arguments.arguments])
    if wrong := [pair for pair in arguments.env if "=" not in pair]:
        raise ConfigError(f"--env {wrong[0]} is not KEY=VALUE")
    submitter = Submitter(arguments.address, arguments.name or name_of([arguments.job, *arguments.arguments]))
    if arguments.stop:
        attempt = submitter.stop()
    else:
        attempt = submitter.submit(command, dict(pair.split("=", 1) for pair in arguments.env))
        if arguments.detach:
            return 0
    ended = follow(submitter, attempt)
    if ended.exit_code is None and ended.message:
        say(ended.message)
    say(f"{ended.id}: {ended.status.value.lower()}, exit code {code_of(ended)}")
    return 0 if arguments.stop else code_of(ended)


def main() -> int:
    """Parse the arguments and submit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", metavar="URL", help="of the cluster's dashboard, such as http://127.0.0.1:8265")
    parser.add_argument("--name", help="of the attempts (default: the run's)")
    parser.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help="for the job's environment")
    parser.add_argument("--detach", action="store_true", help="do not wait for the job")
    parser.add_argument("--stop", action="store_true", help="tell the one that runs to save and end, and wait for that")
    parser.add_argument("job", help="its file, such as jobs/train_bct.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the job's own")
    arguments = parser.parse_args()

    from pipeline.job import exit_code

    codes: list[int] = []
    return exit_code(lambda: codes.append(submit(arguments)), FOLLOWS) or codes[0]


if __name__ == "__main__":
    sys.exit(main())
