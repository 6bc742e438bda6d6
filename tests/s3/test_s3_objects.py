"""Objects of a bucket through storage.py: the same as files, against a server that asks for keys."""

import functools
import hashlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from data_pipeline.common import s3 as s3
from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, UserError

pytestmark = pytest.mark.xdist_group("s3")  # one server for them all


def test_what_is_written_is_read(bucket, proxy):
    path = f"s3://{bucket}/set/file"
    storage.write_atomically(path, b"0123456789")
    assert storage.read_bytes(path) == b"0123456789"
    assert storage.read_bytes(path, 3, 4) == b"3456"
    assert storage.read_bytes(path, 3) == b"3456789"
    assert storage.read_bytes(path, 3, 0) == b""
    assert (storage.size(path), storage.exists(path)) == (10, True)
    before = proxy.count()["HEAD"]
    assert not storage.exists(f"s3://{bucket}/set/other")
    assert storage.size_if_there(f"s3://{bucket}/set/other") is None
    assert proxy.count()["HEAD"] == before + 2
    storage.remove(path)
    storage.remove(path)
    assert not storage.exists(path)


def test_folders_and_sizes_come_of_listings(bucket, server, proxy):
    client, number = server.client(), server.page + 1
    with ThreadPoolExecutor(8) as pool:
        put = functools.partial(client.put_object, Bucket=bucket)
        list(pool.map(lambda n: put(Key=f"set/shards/{n:06d}.tar", Body=b"x" * (n % 3)), range(number)))
    client.put_object(Bucket=bucket, Key="set/manifest.json", Body=b"{}")
    sizes = storage.sizes(f"s3://{bucket}/set/shards")
    assert sizes == {f"{n:06d}.tar": n % 3 for n in range(number)}
    assert len(proxy.requests) == 2
    assert storage.files(f"s3://{bucket}/set", ".json") == ["manifest.json"]
    assert storage.subfolders(f"s3://{bucket}/set/") == ["shards"]
    assert (storage.subfolders(f"s3://{bucket}/none"), storage.files(f"s3://{bucket}/none", "")) == ([], [])


def test_large_objects_go_and_come_in_parts(bucket, server, proxy, monkeypatch):
    monkeypatch.setattr(s3, "PART", 5 * 2**20)  # the least that S3 allows
    data = hashlib.shake_128(b"seed").digest(12 * 2**20 + 1)
    path = f"s3://{bucket}/large"
    storage.write_atomically(path, data)
    assert proxy.count() == {"POST": 2, "PUT": 3}
    stored = server.client().get_object(Bucket=bucket, Key="large")
    assert stored["Body"].read() == data
    assert stored["ETag"].endswith('-3"')
    assert storage.read_bytes(path, 0, len(data)) == data
    assert storage.read_bytes(path) == data
    assert proxy.count()["GET"] == 4


def test_an_object_that_ends_early_is_a_sentence(bucket):
    path = f"s3://{bucket}/file"
    storage.write_atomically(path, b"0123456789")
    with pytest.raises(DataError, match=r"ends at byte 10, before 12"):
        storage.read_bytes(path, 0, 12)
    with pytest.raises(DataError, match=r"shorter than it should be"):
        storage.read_bytes(path, 20, 2)


MISTAKES = {
    "wrong secret": ({"AWS_SECRET_ACCESS_KEY": "wrongsecret"}, "AWS_SECRET_ACCESS_KEY"),
    "wrong key": ({"AWS_ACCESS_KEY_ID": "AKIAWRONGKEY"}, "AWS_ACCESS_KEY_ID"),
    "no keys": ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no keys were found"),
    "half of the keys": ({"AWS_SECRET_ACCESS_KEY": ""}, "one of the two keys is missing"),
    "unknown profile": ({"AWS_PROFILE": "nobody"}, "unset AWS_PROFILE"),
    "no region": ({"AWS_REGION": "no region"}, "name is not valid: correct AWS_REGION"),
    "nobody listens": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "STORE_ATTEMPTS": "2"}, "2 attempts"),
    "unknown host": ({"AWS_ENDPOINT_URL": "http://nowhere.invalid", "STORE_ATTEMPTS": "2"}, "2 attempts"),
    "no URL": ({"AWS_ENDPOINT_URL": "127.0.0.1:9000"}, "must be http"),
    "key in URL": ({"AWS_ENDPOINT_URL": "http://me:hiddensecret@127.0.0.1:9000"}, "must be http"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("use", [storage.read_bytes, storage.size_if_there, storage.sizes])
def test_mistakes_end_in_a_sentence_without_keys(bucket, server, monkeypatch, new_client, mistake, use):
    server.client().put_object(Bucket=bucket, Key="file", Body=b"data")
    settings, expected = MISTAKES[mistake]
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=expected) as raised:
        use(f"s3://{bucket}/file")
    said = str(raised.value)
    assert "\n" not in said
    assert raised.value.__cause__ is None
    for secret in (server.key, server.secret, "wrongsecret", "AKIAWRONGKEY", "hiddensecret"):
        assert secret not in said


@pytest.mark.parametrize("use", [storage.read_bytes, storage.exists, storage.sizes])
def test_a_missing_bucket_is_told_from_a_missing_object(bucket, use):
    with pytest.raises(UserError, match=r"there is no such bucket"):
        use("s3://nobodys-bucket/file")


def test_a_missing_object_and_a_bad_name_are_sentences(bucket):
    with pytest.raises(UserError, match=r"there is no such object"):
        storage.read_bytes(f"s3://{bucket}/none")
    with pytest.raises(UserError, match=r"name of the bucket or object is not valid"):
        storage.read_bytes("s3://Not A Bucket/none")
    with pytest.raises(UserError, match=r"name of the bucket or object is not valid"):
        storage.read_bytes(f"s3://{bucket}")


def test_a_forked_process_reads_with_a_client_of_its_own(bucket):
    path = f"s3://{bucket}/file"
    storage.write_atomically(path, b"data")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        assert pool.submit(storage.read_bytes, path).result(30) == b"data"


def test_settings_reach_this_process_and_those_it_starts(bucket, monkeypatch, tmp_path):
    for name in s3.VARIABLES.values():
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back at the end
    storage.configure(endpoint="http://host:1", region="here", deadline_s=7, attempts=2, cache=None)
    assert s3.Settings.now() == s3.Settings("http://host:1", "here", 7.0, 2)
    storage.configure(attempts=None)
    assert os.environ["STORE_ATTEMPTS"] == "2"
    with pytest.raises(UserError, match="STORE_ATTEMPTS a whole number"):
        storage.configure(attempts=0)
    storage.configure(attempts=2)
    with pytest.raises(UserError, match="must be set together"):
        storage.configure(cache=str(tmp_path))
