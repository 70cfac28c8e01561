"""A SuperLink and three SuperNodes on this machine, with TLS and SuperNode authentication.

    python examples/deployment/deploy.py up        # once; about 10 seconds
    python examples/deployment/deploy.py run       # three.toml, or --file yours.toml
    python examples/deployment/deploy.py play --app DIR     # any Flower app
    python examples/deployment/deploy.py down

Everything lies in one folder (``--folder``): keys, certificates, logs, results. Telemetry, update
checks and run-time installs are off, and nothing listens or connects beyond 127.0.0.1. `run`
and `play` end with 0 only if it completed; else they say why not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONNECTION = "deployment"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
}


_STARTED: list[subprocess.Popen[bytes]] = []  # they outlive whoever started them


class DeploymentBroke(RuntimeError):
    """A part of the deployment did not do what it should have."""


@dataclass(frozen=True)
class Deployment:
    """A SuperLink and ``num_nodes`` SuperNodes, all of whose files lie in ``folder``."""

    folder: Path
    num_nodes: int = 3

    def up(self) -> None:
        """Make keys and certificates, start everything, and wait until every node is online."""
        if self._pids():
            raise DeploymentBroke(f"{self.folder} is up already: `down` first")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        make_certificates(self.folder)
        port = free_port()
        (self.folder / "port").write_text(str(port))
        home = self.folder / "flwr"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{port}"\n'
            f'root-certificates = "{self.folder.resolve() / "ca.crt"}"\n'
        )
        self.start(
            "superlink",
            "flower-superlink",
            "--ssl-ca-certfile", "ca.crt",
            "--ssl-certfile", "server.crt",
            "--ssl-keyfile", "server.key",
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            "--host", "127.0.0.1",
            "--port", str(port),
        )  # fmt: skip
        self._await("the SuperLink listens", lambda: listens(port))
        for i in range(self.num_nodes):
            make_node_key(self.folder / f"node{i}")
            self.flwr("supernode", "register", f"node{i}.pub", CONNECTION)
            self.start_node(i)
        self._await("all SuperNodes are online", lambda: self.num_online() == self.num_nodes)

    def down(self) -> None:
        """End every process that ``up`` started, by its id."""
        for name, pid in reversed(self._pids().items()):
            end(pid)
            (self.folder / f"{name}.pid").unlink()
        for process in _STARTED:  # here, and now over: nothing is left to warn of
            process.poll()

    def run(
        self, app: Path, out: Path, config: Mapping[str, Any] | None = None, seconds: float = 600.0
    ) -> dict[str, Any]:
        """Run an exported app to its end; return what its server wrote to ``run.json``.

        Raises:
            DeploymentBroke: If the federation did not complete, with its reason.
        """
        shutil.rmtree(out, ignore_errors=True)
        shown = self._stream(app, {"out": str(out.resolve())} | dict(config or {}), seconds)
        try:
            record: dict[str, Any] = json.loads((out / "run.json").read_text())
        except FileNotFoundError:
            raise DeploymentBroke(f"the server wrote nothing; Flower said:\n{shown}") from None
        if not record["completed"]:
            raise DeploymentBroke(f"the run stopped: {record['reason']}")
        return record

    def play(self, app: Path, config: Mapping[str, Any] | None = None, seconds: float = 600) -> str:
        """Run any Flower app to its end; return what it showed.

        Raises:
            DeploymentBroke: If its ServerApp failed, with its reason. `flwr run` ends with 0 then.
        """
        shown = self._stream(app, config or {}, seconds)
        said = self.flwr("list", CONNECTION, "--format", "json")
        runs = json.loads(said[said.index("{") :])["runs"]
        latest = max(runs, key=lambda run: run["pending-at"])
        if latest["status"] != "finished:completed":
            raise DeploymentBroke(f"{latest['status']}: {latest['status-details']}")
        return shown

    def _stream(self, app: Path, config: Mapping[str, Any], seconds: float) -> str:
        said = " ".join(f"{k}={json.dumps(v)}" for k, v in config.items())
        try:
            shown = self.flwr(
                *("run", str(app.resolve()), CONNECTION, "--stream"),
                *(("--run-config", said) if said else ()),
                seconds=seconds,
            )
        except subprocess.TimeoutExpired:
            raise DeploymentBroke(f"the run took more than {seconds:g} seconds") from None
        (self.folder / "run.log").write_text(shown)
        return shown

    def start_node(self, i: int, *options: str, name: str = "", secure: bool = True) -> int:
        """Start SuperNode ``i``; return its process id. ``options`` replace its own."""
        trust = ["--root-certificates", "ca.crt", "--auth-supernode-private-key", f"node{i}"]
        return self.start(
            name or f"supernode{i}",
            "flower-supernode",
            *(options or trust if secure else options),
            "--superlink", f"127.0.0.1:{self.port}",
            "--port", str(free_port()),
            "--node-config", f"partition-id={i} num-partitions={self.num_nodes}",
        )  # fmt: skip

    def start(self, name: str, program: str, *arguments: str) -> int:
        """Start a process of this deployment, in a group of its own; return its id."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [beside_python(program), *arguments],
                cwd=self.folder,
                env=self.environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        _STARTED.append(process)
        (self.folder / f"{name}.pid").write_text(str(process.pid))
        return process.pid

    def flwr(self, *arguments: str, seconds: float = 60.0) -> str:
        """Run Flower's command line against this deployment; return what it said."""
        done = subprocess.run(
            [beside_python("flwr"), *arguments],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        said = done.stdout + done.stderr
        if done.returncode:
            raise DeploymentBroke(f"flwr {' '.join(arguments[:2])} failed:\n{said}")
        return said

    def num_online(self) -> int:
        """Return how many SuperNodes the SuperLink takes to be there."""
        said = self.flwr("supernode", "list", CONNECTION, "--format", "json")
        nodes = json.loads(said[said.index("{") :]).get("nodes", [])
        return sum(node.get("status") == "online" for node in nodes)

    @property
    def port(self) -> int:
        return int((self.folder / "port").read_text())

    def environment(self) -> dict[str, str]:
        own = str(Path(sys.executable).parent)
        path = f"{own}{os.pathsep}{os.environ.get('PATH', '')}"
        home = str((self.folder / "flwr").resolve())
        return dict(os.environ) | QUIET | {"PATH": path, "FLWR_HOME": home}

    def _pids(self) -> dict[str, int]:
        found = {p.stem: int(p.read_text()) for p in sorted(self.folder.glob("*.pid"))}
        return {name: pid for name, pid in found.items() if alive(pid)}

    def _await(self, what: str, is_so: Any, seconds: float = 90.0) -> None:
        ends = time.monotonic() + seconds
        while not is_so():
            if dead := [p.stem for p in self.folder.glob("*.pid") if not alive(int(p.read_text()))]:
                said = (self.folder / f"{dead[0]}.log").read_text()[-2000:]
                raise DeploymentBroke(f"{dead[0]} ended:\n{said}")
            if time.monotonic() > ends:
                raise DeploymentBroke(f"after {seconds:g} seconds it is still not so that {what}")
            time.sleep(0.3)


def make_certificates(folder: Path, prefix: str = "") -> None:
    """Make a certificate authority, and a server's certificate for this machine alone."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now, curve = datetime.now(UTC), ec.SECP256R1()
    authority, server = ec.generate_private_key(curve), ec.generate_private_key(curve)

    def certificate(name: str, key: Any, is_authority: bool) -> Any:
        def called(common: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])

        here = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
        usage = dict.fromkeys(
            (
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        return (
            x509.CertificateBuilder()
            .subject_name(called(name))
            .issuer_name(called("authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=7))
            .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=True,
                    key_cert_sign=is_authority,
                    crl_sign=is_authority,
                    **usage,
                ),
                critical=True,
            )
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName(here), critical=False)
            .sign(authority, hashes.SHA256())
        )

    write_secret(folder / f"{prefix}server.key", _pem(server))
    for name, key, is_authority in (("ca", authority, True), ("server", server, False)):
        made = certificate("authority" if is_authority else "localhost", key, is_authority)
        (folder / f"{prefix}{name}.crt").write_bytes(made.public_bytes(_encoding("PEM")))


def make_node_key(path: Path) -> None:
    """Make a SuperNode's key pair in OpenSSH's form: ``path`` and ``path.pub``."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import NoEncryption, PrivateFormat
    from cryptography.hazmat.primitives.serialization import PublicFormat as Public

    key = ec.generate_private_key(ec.SECP384R1())
    secret = key.private_bytes(_encoding("PEM"), PrivateFormat.OpenSSH, NoEncryption())
    write_secret(path, secret)
    public = key.public_key().public_bytes(_encoding("OpenSSH"), Public.OpenSSH)
    path.with_suffix(".pub").write_bytes(public)


def write_secret(path: Path, secret: bytes) -> None:
    """Write a file that only its owner may read."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "wb") as file:
        file.write(secret)


def _pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import NoEncryption, PrivateFormat

    made: bytes = key.private_bytes(_encoding("PEM"), PrivateFormat.PKCS8, NoEncryption())
    return made


def _encoding(name: str) -> Any:
    from cryptography.hazmat.primitives.serialization import Encoding

    return getattr(Encoding, name)


def beside_python(program: str) -> str:
    """Return a program of this Python's environment."""
    own = Path(sys.executable).with_name(program)
    if not own.exists():
        raise DeploymentBroke(f"there is no {own}: pip install 'turncoat[flower]'")
    return str(own)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def alive(pid: int) -> bool:
    """Say whether a process runs; one of our own that has ended is taken away."""
    with suppress(ChildProcessError):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def end(pid: int, seconds: float = 10.0) -> None:
    """End a process of ours with all its children: politely, then not."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, sign)
        ends = time.monotonic() + seconds
        while alive(pid) and time.monotonic() < ends:
            time.sleep(0.1)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="deploy.py", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["up", "run", "play", "down", "status"])
    parser.add_argument("--folder", type=Path, default=Path("deployment"))
    parser.add_argument("--file", type=Path, default=HERE / "three.toml")
    parser.add_argument("--app", type=Path, help="the folder of a Flower app, for play")
    parser.add_argument("--set", default="", help="run config, such as 'attack=\"sign-flip\"'")
    chosen = parser.parse_args(arguments)
    there = Deployment(chosen.folder)
    try:
        if chosen.what == "up":
            there.up()
            print(f"up: SuperLink on 127.0.0.1:{there.port}, {there.num_nodes} SuperNodes")
        elif chosen.what == "down":
            there.down()
            print("down")
        elif chosen.what == "status":
            print(f"{there.num_online()} of {there.num_nodes} SuperNodes are online")
        elif chosen.what == "play":
            if chosen.app is None:
                parser.error("play needs --app, the folder of a Flower app")
            print(there.play(chosen.app, tomllib.loads(chosen.set.replace(";", "\n"))))
        else:
            from turncoat.runtimes.flower.export import export

            app = there.folder / "app"
            export(chosen.file, app)
            config = {"defence": "median"} if chosen.file.parent == HERE else {}
            config |= tomllib.loads(chosen.set.replace(";", "\n"))
            record = there.run(app, there.folder / "result", config)
            for played in record["rounds"]:
                print(json.dumps(played))
            print(f"completed; sha256 of the model: {record['sha256']}")
    except DeploymentBroke as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
