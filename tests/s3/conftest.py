"""An S3 server that asks for keys (moto, a process of its own), with a proxy before it that can do harm."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import boto3
import pytest
from fault_proxy import FaultProxy

from data_pipeline.common import s3 as s3

ANYTHING = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
PAGE = 50  # objects that moto lists at once: S3 lists a thousand
NO_OTHERS = (
    "AWS_PROFILE",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL_S3",
    "AWS_DEFAULT_REGION",
    "HTTP_PROXY",
    "http_proxy",
)


class Server(NamedTuple):
    """Where it listens on loopback, and a key that it knows."""

    port: int
    key: str
    secret: str
    page: int = 1000  # objects that it lists at once

    def client(self, service: str = "s3"):
        """Past the proxy, and by another library than the one that is tested."""
        return boto3.client(
            service,
            endpoint_url=f"http://127.0.0.1:{self.port}",
            region_name="us-east-1",
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
        )


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """moto; or whatever listens on S3_TEST_PORT and knows the environment's keys, as under benchmarks/ceph.sh."""
    if port := os.environ.get("S3_TEST_PORT"):
        yield Server(int(port), os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
        return
    log = tmp_path_factory.mktemp("moto") / "log.txt"
    code = "from moto.server import main; main(['-H', '127.0.0.1', '-p', '0'])"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            # The requests that making a key takes, and few objects a page of a listing, so that there are several.
            env={**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "3", "MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE)},
            stdout=output,
            stderr=output,
        )
    try:
        port = port_of(process, log)
        iam = Server(port, "none", "none").client("iam")
        iam.create_user(UserName="trainer")
        made = iam.create_access_key(UserName="trainer")["AccessKey"]
        iam.put_user_policy(UserName="trainer", PolicyName="all", PolicyDocument=json.dumps(ANYTHING))
        yield Server(port, made["AccessKeyId"], made["SecretAccessKey"], PAGE)
    finally:
        process.kill()
        process.wait()


def port_of(process: subprocess.Popen, log: Path) -> int:
    """The free port that it has taken, once it listens."""
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        if said := re.search(r"Running on http://127\.0\.0\.1:(\d+)", log.read_text()):
            return int(said[1])
        time.sleep(0.05)
    raise AssertionError(f"moto does not listen:\n{log.read_text()}")


@pytest.fixture(scope="session")
def lasting_proxy(server: Server) -> Iterator[FaultProxy]:
    with FaultProxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def proxy(lasting_proxy: FaultProxy) -> Iterator[FaultProxy]:
    """One for all tests, as a client of it takes a second to make."""
    lasting_proxy.clear()
    yield lasting_proxy
    lasting_proxy.clear()


@pytest.fixture
def new_client() -> Iterator[None]:
    """For tests with keys of their own."""
    s3._client.cache_clear()
    yield
    s3._client.cache_clear()


@pytest.fixture
def bucket(server: Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a new bucket, which the environment leads to through the proxy; retries follow quickly."""
    for name in NO_OTHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    name = f"bucket-{uuid.uuid4().hex[:16]}"  # other workers may use the same server
    server.client().create_bucket(Bucket=name)
    return name
