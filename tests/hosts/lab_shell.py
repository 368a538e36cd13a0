"""A three-host cluster to play with: ``make lab``."""

from __future__ import annotations

import argparse
import cmd
import os
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

from lab import why_not
from lab_cluster import BUCKET, LabCluster, running_cluster


class LabShell(cmd.Cmd):
    """One command a line; the end of the input ends the lab."""

    prompt = "lab> "

    def __init__(self, cluster: LabCluster) -> None:
        super().__init__()
        self.cluster, self.lab = cluster, cluster.lab

    def do_hosts(self, _: str) -> None:
        """hosts: their addresses, and whether they are on"""
        for host in self.lab.hosts.values():
            print(f"{host.name:8} {host.address:12} {'on' if host.is_on else 'off'}")

    def do_on(self, line: str) -> None:
        """on HOST [COMMAND…]: run a command there; without one, a shell"""
        name, *words = shlex.split(line)
        host = self.lab.hosts[name]
        environment = host.environment | self.cluster.environment
        environment["TERM"] = os.environ.get("TERM", "dumb")
        subprocess.run(host.words(words or ["bash", "-i"]), env=environment, check=False)

    def do_join(self, line: str) -> None:
        """join HOST [OPTIONS of ray start]: a new host, or one that was off, becomes a node"""
        name, *options = shlex.split(line)
        if name in self.lab.hosts and not self.lab.hosts[name].is_on:
            self.lab.boot(name)
        self.cluster.join(name, *options)

    def do_kill(self, line: str) -> None:
        """kill HOST: power loss"""
        self.lab.kill(*shlex.split(line))

    def do_cut(self, line: str) -> None:
        """cut HOST: pull its cable; mend HOST plugs it in again"""
        self.lab.cut(*shlex.split(line))

    def do_mend(self, line: str) -> None:
        """mend HOST: end a cut"""
        self.lab.mend(*shlex.split(line))

    def do_part(self, line: str) -> None:
        """part SENDER RECEIVER: what one sends to the other is lost; rejoin ends it"""
        self.lab.part(*shlex.split(line))

    def do_rejoin(self, line: str) -> None:
        """rejoin SENDER RECEIVER: end a part"""
        self.lab.rejoin(*shlex.split(line))

    def do_rate(self, line: str) -> None:
        """rate HOST 1mbit: limit its wire; rate HOST off: no limit"""
        name, rate = shlex.split(line)
        self.lab.rate(name, None if rate == "off" else rate)

    def do_quit(self, _: str) -> bool:
        """quit: end the lab"""
        return True

    do_EOF = do_quit  # noqa: N815 (cmd's name)

    def emptyline(self) -> bool:
        return False

    def onecmd(self, line: str) -> bool:
        try:
            return super().onecmd(line)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            print(f"That did not work: {error}. `help` lists the commands.")
            return False


def main() -> None:
    """Start the hosts, say where everything is, and read commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="hosts beside the head")
    parser.add_argument("--cpus", type=int, default=2, help="that each worker declares")
    arguments = parser.parse_args()
    if reason := why_not():
        raise SystemExit(f"There can be no laboratory here: {reason}.")
    with tempfile.TemporaryDirectory(prefix="ke-ray-lab-") as folder:
        print("Starting the hosts …", flush=True)
        started = time.monotonic()
        with running_cluster(Path(folder), arguments.workers, arguments.cpus) as cluster:
            cluster.wait_for_mlflow()
            shell = LabShell(cluster)
            print(f"Up in {time.monotonic() - started:.0f} s.")
            shell.do_hosts("")
            print(
                f"""
In another terminal:
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={folder}/token
  export MLFLOW_TRACKING_URI={cluster.mlflow_uri}    # as the hosts see it
  ke-ray submit jobs/pretrain.yaml --address {cluster.head.address} \\
    --set env.KE_RAY_RUNS=s3://{BUCKET}/runs
In a browser: Ray's dashboard at {cluster.head.address} (it asks for the token),
  MLflow at {cluster.mlflow_here}. S3 for this machine: AWS_ENDPOINT_URL={
                    cluster.s3_here["AWS_ENDPOINT_URL"]
                } (any keys).
Logs are in {folder}. Here: `on h2`, `kill h2`, `cut store`, `help`, `quit`.
"""
            )
            shell.cmdloop()


if __name__ == "__main__":
    main()
