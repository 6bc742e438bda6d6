"""Objects in S3 buckets (s3fs): requests end in bounded time, are retried where that may help, or fail in one sentence.

Only this module decides how often and how long to retry: the retries of s3fs and botocore are switched off, so that
the total is bounded. Keys come from the environment, and no message contains them: the server's answer is reduced to
its error code.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import os
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from data_pipeline.common.errors import DataError, UserError

T = TypeVar("T")
VARIABLES = {
    "endpoint": "AWS_ENDPOINT_URL",
    "region": "AWS_REGION",
    "deadline_s": "STORE_DEADLINE_S",
    "attempts": "STORE_ATTEMPTS",
    "cache": "STORE_CACHE",
    "cache_gb": "STORE_CACHE_GB",
}
ENDPOINT, REGION, DEADLINE, ATTEMPTS, CACHE, CACHE_GB = VARIABLES.values()
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0  # seconds between attempts: doubled each time; the wait is a random part of that
SLOWEST = 2**20  # bytes a second: gives an attempt more time than the deadline, by its size
PART = 32 * 2**20  # bytes of an object that one request reads or writes: what a broken connection costs
PARTS_AT_ONCE = 4
TRANSIENT = {"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "BadDigest", "OperationAborted"}
TRANSIENT |= {"Throttling", "ThrottlingException", "TooManyRequests", "IncompleteBody", "XAmzContentSHA256Mismatch"}


class Settings(NamedTuple):
    """Settings of the store, in the environment, which spawned workers and started processes inherit.

    deadline_s: a connection that transfers nothing for so long is given up. attempts: of each request.
    """

    endpoint: str | None
    region: str | None
    deadline_s: float
    attempts: int

    @classmethod
    def now(cls) -> Settings:
        value = os.environ.get
        try:
            deadline, attempts = float(value(DEADLINE) or 30), int(value(ATTEMPTS) or 6)
        except ValueError:
            deadline = attempts = 0
        if deadline <= 0 or attempts < 1:
            raise UserError(
                f"{DEADLINE} must be a number of seconds above 0, and {ATTEMPTS} a whole number, 1 or more."
            )
        endpoint = value(ENDPOINT) or None
        if endpoint and (not endpoint.startswith(("http://", "https://")) or "@" in endpoint):
            raise UserError(
                f"{ENDPOINT} must be http(s)://host:port; keys belong in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            )
        return cls(endpoint, value(REGION) or value("AWS_DEFAULT_REGION") or None, deadline, attempts)


class CutShort(Exception):
    """Fewer bytes arrived than were announced."""


def read(path: str, start: int = 0, length: int | None = None) -> bytes:
    """`length` bytes from `start` (all: None), long ones in parallel parts. A shorter object is a DataError."""
    if length is None or length <= PART:
        return _tried(path, functools.partial(_get, path, start, length), length or PART)
    places = [(at, min(PART, start + length - at)) for at in range(start, start + length, PART)]
    calls = [(functools.partial(_get, path, *place), place[1]) for place in places]
    return b"".join(_all_tried(path, calls))


def read_if_there(path: str) -> bytes | None:
    """All bytes; None if there is no such object."""

    async def get(client: Any) -> bytes | None:
        try:
            return await _get(path, 0, None, client)
        except FileNotFoundError as error:
            if code_of(error) == "NoSuchBucket":
                raise
            return None

    return _tried(path, get, PART)


async def _get(path: str, start: int, length: int | None, client: Any) -> bytes:
    if length == 0:
        return b""
    end = "" if length is None else start + length - 1
    limits = {} if start == 0 and length is None else {"Range": f"bytes={start}-{end}"}
    answer = await client._call_s3("get_object", **_place(path), **limits)
    async with answer["Body"] as body:
        data = await body.read()
    if len(data) != answer["ContentLength"]:  # aiohttp raises earlier, where it is the client
        raise CutShort
    if length is not None and len(data) != length:
        raise DataError(f"{path} ends at byte {start + len(data)}, before {start + length}: copy or make it again.")
    return data


def size(path: str) -> int | None:
    """Size in bytes; None if there is no such object. A missing bucket is a UserError."""

    async def head(client: Any) -> int | None:
        try:
            return (await client._call_s3("head_object", **_place(path)))["ContentLength"]
        except FileNotFoundError:
            return None

    found = _tried(path, head)
    if found is None:
        _refuse_missing_bucket(path.removeprefix("s3://").partition("/")[0], Settings.now())
    return found


@functools.cache
def _refuse_missing_bucket(bucket: str, settings: Settings) -> None:
    """Tell a missing bucket from a missing object, which a HEAD, having no body, can't: asked once."""
    _tried(f"s3://{bucket}", lambda client: client._call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1))


def listed(path: str) -> tuple[dict[str, int], list[str]]:
    """What lies directly below: {name of object: bytes}, and names of folders. One request for each thousand."""
    place = _place(path.rstrip("/") + "/")
    bucket, prefix = place["Bucket"], place["Key"]
    objects: dict[str, int] = {}
    folders: list[str] = []
    more: dict[str, str] = {}
    while True:
        asked = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/", **more}
        page = _tried(path, lambda client, asked=asked: client._call_s3("list_objects_v2", **asked))
        objects |= {found["Key"].removeprefix(prefix): found["Size"] for found in page.get("Contents", [])}
        folders += [found["Prefix"].removeprefix(prefix).rstrip("/") for found in page.get("CommonPrefixes", [])]
        if not page.get("IsTruncated"):
            objects.pop("", None)  # a "folder" that a browser made
            return objects, folders
        more = {"ContinuationToken": page["NextContinuationToken"]}


def write(path: str, data: bytes) -> None:
    """Write all of it under its name, or nothing; long data in parts. The server checks each part by its MD5."""
    place = _place(path)
    if len(data) <= PART:
        _tried(path, functools.partial(_put, "put_object", place, data), len(data))
        return
    upload = _tried(path, lambda client: client._call_s3("create_multipart_upload", **place))["UploadId"]
    try:
        calls = [
            (functools.partial(_put, "upload_part", {**place, "UploadId": upload, "PartNumber": number}, part), PART)
            for number, part in _parts(data)
        ]
        marks = [{"PartNumber": n, "ETag": answer["ETag"]} for n, answer in enumerate(_all_tried(path, calls), 1)]
        _tried(path, functools.partial(_complete, path, {**place, "UploadId": upload}, marks, len(data)))
    except BaseException:
        with contextlib.suppress(UserError):  # the first error is the one to report
            _tried(path, lambda client: client._call_s3("abort_multipart_upload", **place, UploadId=upload))
        raise


def _parts(data: bytes) -> Iterator[tuple[int, memoryview]]:
    whole = memoryview(data)
    return ((1 + at // PART, whole[at : at + PART]) for at in range(0, len(data), PART))


async def _put(method: str, place: dict[str, Any], data: bytes | memoryview, client: Any) -> Any:
    digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
    return await client._call_s3(method, **place, Body=bytes(data), ContentMD5=digest)


async def _complete(path: str, upload: dict[str, Any], marks: list[dict[str, Any]], length: int, client: Any) -> None:
    try:
        await client._call_s3("complete_multipart_upload", **upload, MultipartUpload={"Parts": marks})
    except FileNotFoundError:  # no such upload: an earlier attempt may have completed it, and its answer was lost
        if (await client._call_s3("head_object", **_place(path)))["ContentLength"] != length:
            raise


def remove(path: str) -> None:
    """Remove the object if it exists."""
    _tried(path, lambda client: client._call_s3("delete_object", **_place(path)))


def _place(path: str) -> dict[str, str]:
    bucket, _, key = path.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


@functools.cache
def _client(process: int, settings: Settings) -> Any:
    """The client, made in the process that uses it: s3fs does not survive a fork."""
    import s3fs

    config: dict[str, Any] = {
        "connect_timeout": min(10.0, settings.deadline_s),
        "read_timeout": settings.deadline_s,
        "retries": {"total_max_attempts": 1},
        "max_pool_connections": 32,
        # checksums other than MD5 are Amazon's own: other servers refuse them
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    if settings.endpoint:
        config["s3"] = {"addressing_style": "path"}  # other servers seldom have a host name for each bucket
    region = {"region_name": settings.region} if settings.region else {}
    client = s3fs.S3FileSystem(
        endpoint_url=settings.endpoint,
        client_kwargs=region,
        config_kwargs=config,
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    client.retries = 1
    client.connect()  # here, where no deadline runs: botocore reads its tables for some tenths of a second
    return client


def _tried(path: str, once: Callable[[Any], Awaitable[T]], length: int = 0) -> T:
    """The result of `once(client)`, which transfers `length` bytes; within `attempts` and their time limits."""
    return _all_tried(path, [(once, length)])[0]


def _all_tried(path: str, calls: list[tuple[Callable[[Any], Awaitable[T]], int]]) -> list[T]:
    """The same for several calls, some of them in parallel; the first that finally fails ends them all."""
    from fsspec.asyn import sync

    settings = Settings.now()
    try:
        client = _client(os.getpid(), settings)
    except Exception as error:  # one key of the two is missing, the profile is unknown, or the region's name is invalid
        raise sentence(path, error, settings) from None

    async def together() -> list[T]:
        room = asyncio.Semaphore(PARTS_AT_ONCE)

        async def one(once: Callable[[Any], Awaitable[T]], length: int) -> T:
            async with room:
                return await _attempts(path, settings, client, once, length)

        tasks = [asyncio.ensure_future(one(*call)) for call in calls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    return sync(client.loop, together)


async def _attempts(path: str, settings: Settings, client: Any, once: Callable[[Any], Awaitable[T]], length: int) -> T:
    for attempt in range(settings.attempts):
        try:
            return await asyncio.wait_for(once(client), settings.deadline_s + length / SLOWEST)
        except UserError:
            raise
        except Exception as error:
            last = attempt + 1 == settings.attempts
            if last or not is_transient(error):
                raise sentence(path, error, settings) from None
        await asyncio.sleep(random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt)))
    raise AssertionError


def code_of(error: BaseException) -> str:
    """The server's name for its refusal: S3's error code, or a number; "" if no server answered."""
    answer = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return str(answer.get("Error", {}).get("Code", "")) if isinstance(answer, dict) else ""


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later: the cause is the server or the network, not the request."""
    from aiohttp import ClientError as NetworkError
    from botocore.exceptions import ConnectionError as NoConnection
    from botocore.exceptions import HTTPClientError, IncompleteReadError, ResponseStreamingError
    from botocore.parsers import ResponseParserError

    code = code_of(error)
    if code:
        return code in TRANSIENT or code in ("408", "429") or (code.isdigit() and int(code) >= 500)
    network = (NetworkError, NoConnection, HTTPClientError, IncompleteReadError, ResponseStreamingError)
    return isinstance(error, (*network, ResponseParserError, CutShort, TimeoutError, ConnectionError))


REFUSALS = {
    "InvalidAccessKeyId": "the store does not know this key: check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret does not belong to the key: check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session token is no longer valid: get new keys",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
    "NoSuchBucket": "there is no such bucket: check its name and AWS_ENDPOINT_URL, or create it",
    "NoSuchKey": "there is no such object: check the path",
    "InvalidRange": "it is shorter than it should be: copy or make it again",
    "NoCredentialsError": "no keys were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "PartialCredentialsError": "one of the two keys is missing: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "ProfileNotFound": "the AWS configuration has no such profile: unset AWS_PROFILE, or set it to an existing one",
    "InvalidRegionError": "the region's name is not valid: correct AWS_REGION",
    "ParamValidationError": "the name of the bucket or object is not valid: use s3://bucket/path",
    "AccessDenied": "access with these keys is denied: check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and their "
    "permissions for this bucket",
    "PermanentRedirect": "the bucket is in another region: set AWS_REGION",
}
REFUSALS |= {"403": REFUSALS["AccessDenied"], "404": REFUSALS["NoSuchKey"], "301": REFUSALS["PermanentRedirect"]}
REFUSALS |= {"416": REFUSALS["InvalidRange"], "AuthorizationHeaderMalformed": REFUSALS["PermanentRedirect"]}


def sentence(path: str, error: Exception, settings: Settings) -> UserError:
    """The sentence for the user: never the text of the server or library, which may contain a key."""
    where = settings.endpoint or "Amazon S3"
    name = code_of(error) or type(error).__name__
    if name in REFUSALS:
        kind = DataError if REFUSALS[name] is REFUSALS["InvalidRange"] else UserError
        return kind(f"{path} at {where}: {REFUSALS[name]} ({name}).")
    if is_transient(error):
        return UserError(
            f"{path}: {where} did not answer correctly in {settings.attempts} attempts of {settings.deadline_s:g} s "
            f"({name}): check AWS_ENDPOINT_URL and the network, or raise {ATTEMPTS} and {DEADLINE}."
        )
    return UserError(f"{path}: {where} refused the request ({name}): check the path, AWS_ENDPOINT_URL and AWS_REGION.")
