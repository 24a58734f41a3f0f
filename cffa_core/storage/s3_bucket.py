"""The one-shot set-up of a cluster's bucket; no other code creates or configures one."""

from __future__ import annotations

import logging
import random
import time

from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.error import S3Error
from minio.lifecycleconfig import AbortIncompleteMultipartUpload, LifecycleConfig, Rule

ABANDONED_DAYS = 3
_ATTEMPTS = 5
_RULE = "cffa-abort-incomplete-uploads"
_UNABLE = {"NotImplemented", "MethodNotAllowed", "MalformedXML", "InvalidRequest", "InvalidArgument"}
_EXISTS = {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}
_log = logging.getLogger("cffa.storage")


def make_bucket(client: Minio, bucket: str) -> bool:
    """Create ``bucket`` unless it is there; returns whether the server removes uploads that were never finished.

    May run at once in many places. Raises what the client raises, also for a bucket that somebody else owns.
    """
    if not client.bucket_exists(bucket):
        try:
            client.make_bucket(bucket)
        except S3Error as error:
            if error.code not in _EXISTS or not client.bucket_exists(bucket):
                raise
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _abort_abandoned(client, bucket)
            break
        except S3Error as error:
            if error.code in _UNABLE:
                _log.warning("bucket %s: no rule for unfinished uploads, the server answers %s", bucket, error.code)
                return False
            # Of two set-ups that write the rule at once a server may fail one; then the other's is there to be read.
            if error.response.status < 500 or attempt == _ATTEMPTS:
                raise
            time.sleep(random.uniform(0.1, 0.5) * attempt)
    return True


def _abort_abandoned(client: Minio, bucket: str) -> None:
    """Add a rule beside those that are there; one of the operator's that does the same counts."""
    found = client.get_bucket_lifecycle(bucket)
    rules = list(found.rules) if found is not None else []
    if any(rule.abort_incomplete_multipart_upload is not None for rule in rules):
        return
    ours = Rule(
        ENABLED,
        rule_filter=Filter(prefix=""),
        rule_id=_RULE,
        abort_incomplete_multipart_upload=AbortIncompleteMultipartUpload(days_after_initiation=ABANDONED_DAYS),
    )
    # A server may have kept the rule without its end; it is written again, not twice.
    others = [rule for rule in rules if rule.rule_id != _RULE]
    client.set_bucket_lifecycle(bucket, LifecycleConfig([*others, ours]))
