from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetManifestRequest(_message.Message):
    __slots__ = ("version", "channel")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    version: str
    channel: str
    def __init__(self, version: _Optional[str] = ..., channel: _Optional[str] = ...) -> None: ...

class GetManifestReply(_message.Message):
    __slots__ = ("manifest", "version", "release", "signed", "keys")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    version: str
    release: Release
    signed: Signed
    keys: Signed
    def __init__(self, manifest: _Optional[bytes] = ..., version: _Optional[str] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., signed: _Optional[_Union[Signed, _Mapping]] = ..., keys: _Optional[_Union[Signed, _Mapping]] = ...) -> None: ...

class Signed(_message.Message):
    __slots__ = ("statement", "signature")
    STATEMENT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    statement: bytes
    signature: bytes
    def __init__(self, statement: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("id", "artifact_version", "trainable_set", "parameters_digest", "parameters_bytes")
    ID_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_VERSION_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_SET_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_BYTES_FIELD_NUMBER: _ClassVar[int]
    id: int
    artifact_version: str
    trainable_set: str
    parameters_digest: str
    parameters_bytes: int
    def __init__(self, id: _Optional[int] = ..., artifact_version: _Optional[str] = ..., trainable_set: _Optional[str] = ..., parameters_digest: _Optional[str] = ..., parameters_bytes: _Optional[int] = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("digest", "first_chunk")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FIRST_CHUNK_FIELD_NUMBER: _ClassVar[int]
    digest: str
    first_chunk: int
    def __init__(self, digest: _Optional[str] = ..., first_chunk: _Optional[int] = ...) -> None: ...

class DownloadChunk(_message.Message):
    __slots__ = ("data", "digest", "total_bytes")
    DATA_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    digest: str
    total_bytes: int
    def __init__(self, data: _Optional[bytes] = ..., digest: _Optional[str] = ..., total_bytes: _Optional[int] = ...) -> None: ...
