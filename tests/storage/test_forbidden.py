"""A bucket that may be read and not written."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import s3fs
from servers import running_s3

from ke_ray import storage
from ke_ray.errors import StorageError
from ke_ray.storage.ownership import claimed


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a service that knows its users; the environment has a reader's keys."""
    with running_s3(tmp_path) as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        users = boto3.client("iam")
        users.create_user(UserName="reader")
        allowed = {"Effect": "Allow", "Action": ["s3:Get*", "s3:List*"], "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
        users.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=policy)
        key = users.create_access_key(UserName="reader")["AccessKey"]
        from_now_on = urllib.request.Request(
            f"{variables['AWS_ENDPOINT_URL']}/moto-api/reset-auth",
            data=b"0",
            headers={"Content-Type": "text/plain"},
        )
        urllib.request.urlopen(from_now_on, timeout=30).close()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        s3fs.S3FileSystem.clear_instance_cache()
        yield "s3://shared/runs"


def test_an_output_in_a_bucket_without_write_permission_is_refused(read_only: str) -> None:
    assert not storage.exists(read_only)
    remedy = rf"refuses access to '{read_only}/.*Access Denied.*keys that may read and write"
    with pytest.raises(StorageError, match=remedy), claimed(read_only, "scan"):
        pass
    with pytest.raises(StorageError, match=remedy):
        storage.check_writable(read_only)
