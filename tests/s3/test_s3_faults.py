"""What servers and networks do wrong: it heals within the attempts, or ends in a sentence in bounded time."""

import hashlib

import pytest

from data_pipeline.common import s3 as s3
from data_pipeline.common import storage
from data_pipeline.common.errors import UserError

pytestmark = pytest.mark.xdist_group("s3")  # one server for them all

FAULTS = ["slow down", "500", "reset", "stall before", "stall", "short"]
DATA = hashlib.shake_128(b"data").digest(200_000)


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    monkeypatch.setenv("STORE_DEADLINE_S", "0.4")
    monkeypatch.setenv("STORE_ATTEMPTS", "3")
    monkeypatch.setattr(s3, "FIRST_PAUSE", 0.01)


@pytest.fixture
def path(bucket, server):
    server.client().put_object(Bucket=bucket, Key="set/file", Body=DATA)
    return f"s3://{bucket}/set/file"


@pytest.mark.parametrize("fault", FAULTS)
def test_reads_heal(path, proxy, fault):
    proxy.faults += [fault] * 2
    assert storage.read_bytes(path, 100, 150_000) == DATA[100:150_100]
    assert not proxy.faults
    proxy.faults += [fault] * 2
    assert storage.read_bytes(path) == DATA
    assert not proxy.faults


@pytest.mark.parametrize("fault", FAULTS)
def test_looks_and_listings_heal(path, proxy, fault):
    folder = path.rpartition("/")[0]
    proxy.faults += [fault] * 2
    assert storage.size_if_there(path) == len(DATA)
    proxy.faults += [fault] * 2
    assert storage.sizes(folder) == {"file": len(DATA)}
    assert not proxy.faults


@pytest.mark.parametrize("fault", FAULTS)
def test_writes_heal(path, proxy, server, bucket, fault):
    proxy.faults += [fault] * 2
    storage.write_atomically(path, DATA[::-1])
    assert server.client().get_object(Bucket=bucket, Key="set/file")["Body"].read() == DATA[::-1]


@pytest.mark.parametrize(
    ("at", "fault"), [(0, "slow down"), (0, "short"), (2, "slow down"), (2, "short"), (4, "short")]
)
def test_an_upload_in_parts_heals(path, proxy, server, bucket, monkeypatch, at, fault):
    """Begin, three parts, complete: each is refused at first, or done while its answer is lost."""
    monkeypatch.setattr(s3, "PART", 5 * 2**20)
    monkeypatch.setenv("STORE_DEADLINE_S", "5")
    data = DATA * 60
    proxy.faults += [*[""] * at, fault]
    storage.write_atomically(path, data)
    assert not proxy.faults
    assert server.client().get_object(Bucket=bucket, Key="set/file")["Body"].read() == data


@pytest.mark.timeout(60)  # the proxy stalls for half a minute each time
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("use", ["read", "look", "list", "write"])
def test_what_does_not_heal_ends_in_a_sentence(path, proxy, fault, use):
    proxy.always = fault
    do = {
        "read": storage.read_bytes,
        "look": storage.size_if_there,
        "list": storage.sizes,
        "write": lambda path: storage.write_atomically(path, DATA),
    }[use]
    with pytest.raises(UserError, match=r"in 3 attempts of 0.4 s .*: check AWS_ENDPOINT_URL") as raised:
        do(path)
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is None


def test_a_refusal_is_not_repeated(path, proxy, monkeypatch, new_client):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    before = len(proxy.requests)
    with pytest.raises(UserError):
        storage.read_bytes(path)
    assert len(proxy.requests) == before + 1


def test_only_the_broken_part_is_read_again(path, proxy, monkeypatch):
    monkeypatch.setattr(s3, "PART", 20_000)
    proxy.faults += ["short"]
    assert storage.read_bytes(path, 0, len(DATA)) == DATA
    assert proxy.bytes_read("/set/file") == len(DATA) + 10_000


def test_a_failed_upload_leaves_nothing(path, bucket, server, proxy, monkeypatch):
    monkeypatch.setattr(s3, "PART", 5 * 2**20)
    proxy.only, proxy.always = "PUT", "500"
    with pytest.raises(UserError, match="in 3 attempts"):
        storage.write_atomically(path + ".new", bytes(11 * 2**20))
    client = server.client()
    assert [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket)["Contents"]] == ["set/file"]
    assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads")
