"""The labelling page of another machine, through SSH: `jaxrlhf label --connect HOST:FOLDER`.

One connection does both: it forwards a port of this machine to the page's port there, and reads the page's secret, which
its owner alone can read, from the file beside the labels. The page itself goes on listening on its own machine alone.
"""

import contextlib
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator

from rich.console import Console

from jaxrlhf.labelling.guard import LOOPBACK
from jaxrlhf.training.preemption import stopping


def connect(place: str, port: int) -> None:
    """Forwards the page of another machine to this one, and prints the address, until Ctrl-C.

    Args:
        place: HOST:FOLDER, of a run, or HOST:FILE, of the labels of `jaxrlhf label`; HOST as SSH knows it.
        port: of the page there; the same here if it is free.

    Raises:
        ValueError: the place is none, SSH is missing or fails, there is no page, or the connection ended.
    """
    host, _, path = place.partition(":")
    if not host or not path or host.startswith("-"):
        raise ValueError(f"--connect takes HOST:FOLDER, a run's folder on a host that SSH knows, got {place!r}.")
    here, console = _free_port(port), Console()
    with stopping() as stop, _tunnel(host, path, here, port) as ssh:
        assert ssh.stdout is not None and ssh.stderr is not None
        token = ssh.stdout.readline().strip()
        if not token and not stop:
            reason = ssh.stderr.read().strip().splitlines() or ["ssh ended"]
            raise ValueError(
                f"The page of {place} was not reached ({reason[-1]}). Give the folder of a run with --annotator browser, "
                "or the labels of jaxrlhf label, as their owner there, and its --port."
            )
        if token:
            console.print("Open this address in a browser; Ctrl-C ends the connection, not the run.", highlight=False)
            address = f"http://{LOOPBACK[0]}:{here}/?token={token}"
            console.print(address, markup=False, highlight=False, soft_wrap=True)
        while not stop and ssh.poll() is None:
            time.sleep(0.1)
        if not stop:
            raise ValueError(f"The connection to {host} has ended. Labels are stored there; the same command goes on.")


@contextlib.contextmanager
def _tunnel(host: str, path: str, here: int, there: int) -> Iterator[subprocess.Popen]:
    """Runs `ssh`, whose first line is the page's token, within the block."""
    # Where SSH begins: in the home there.
    path = path.removeprefix("~/")
    files = f"{path}/people.sqlite.token", f"{path.removesuffix('.jsonl')}.sqlite.token"
    # Then it waits for its input to end, as it does with this process, however that ends.
    remote = (
        f"token=$(cat -- {' '.join(map(shlex.quote, files))} 2>/dev/null); "
        'if [ -z "$token" ]; then echo "no page is or was served from there" >&2; exit 1; fi; '
        'printf "%s\\n" "$token"; exec cat >/dev/null'
    )
    forward = f"{LOOPBACK[0]}:{here}:{LOOPBACK[0]}:{there}"
    command = ["ssh", "-o", "ExitOnForwardFailure=yes", "-L", forward, "--", host, remote]
    pipe = subprocess.PIPE
    try:
        ssh = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    except OSError as error:
        raise ValueError(f"--connect needs the program ssh ({error.strerror}); install a client of SSH.") from None
    try:
        yield ssh
    finally:
        ssh.terminate()
        ssh.communicate()


def _free_port(port: int) -> int:
    """Returns the port, or another one where it is taken on this machine."""
    for wanted in (port, 0):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                listener.bind((LOOPBACK[0], wanted))
                return listener.getsockname()[1]
    raise ValueError("No port of this machine is free.")
