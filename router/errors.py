"""Errors of the router, and the one place that gives them gRPC codes."""

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

Trailing = tuple[tuple[str, bytes], ...]


class ClusterError(Exception):
    """The cluster cannot start or cannot go on; the text names host and rank."""


class InvalidRequestError(ValueError):
    """A client's request that cannot be served as it is; the text names field, value and allowed range."""


class ModelFailedError(Exception):
    """The model's own numbers gave out for one request; the text says where."""


class HandoffFailedError(Exception):
    """A request's KV did not get from prefill to decode; the client may try again."""


class OverloadedError(Exception):
    """Too many requests wait; the client may try again after `retry_s`."""

    def __init__(self, message: str, *, retry_s: float) -> None:
        super().__init__(message)
        self.retry_s = retry_s


def grpc_status(error: Exception) -> tuple[grpc.StatusCode, str, Trailing]:
    """The code, the message and the trailing metadata that a client gets for `error`."""
    if isinstance(error, InvalidRequestError):
        return grpc.StatusCode.INVALID_ARGUMENT, str(error), ()
    if isinstance(error, OverloadedError):
        return grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), (("grpc-status-details-bin", _retry_details(error)),)
    if isinstance(error, ClusterError | HandoffFailedError):
        return grpc.StatusCode.UNAVAILABLE, str(error), ()
    if isinstance(error, ModelFailedError):
        return grpc.StatusCode.INTERNAL, str(error), ()
    return grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}", ()


def _retry_details(error: OverloadedError) -> bytes:
    """google.rpc.Status with RetryInfo, which client libraries read as a retry hint."""
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(int(error.retry_s * 1000))
    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message=str(error), details=[packed])
    return bytes(status.SerializeToString())
