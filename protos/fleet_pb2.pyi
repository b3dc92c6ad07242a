from pocketfed.protos import distribution_pb2 as _distribution_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EnrolRequest(_message.Message):
    __slots__ = ("name", "channel", "protocol", "sdk_version", "enrolment_key", "token")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SDK_VERSION_FIELD_NUMBER: _ClassVar[int]
    ENROLMENT_KEY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    name: str
    channel: str
    protocol: int
    sdk_version: str
    enrolment_key: str
    token: str
    def __init__(self, name: _Optional[str] = ..., channel: _Optional[str] = ..., protocol: _Optional[int] = ..., sdk_version: _Optional[str] = ..., enrolment_key: _Optional[str] = ..., token: _Optional[str] = ...) -> None: ...

class EnrolReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckInRequest(_message.Message):
    __slots__ = ("protocol", "sdk_version", "examples", "wait_s", "release_id", "key_list", "refused_release", "refusal", "report", "tier")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SDK_VERSION_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_LIST_FIELD_NUMBER: _ClassVar[int]
    REFUSED_RELEASE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    sdk_version: str
    examples: int
    wait_s: float
    release_id: int
    key_list: int
    refused_release: int
    refusal: str
    report: ReleaseReport
    tier: str
    def __init__(self, protocol: _Optional[int] = ..., sdk_version: _Optional[str] = ..., examples: _Optional[int] = ..., wait_s: _Optional[float] = ..., release_id: _Optional[int] = ..., key_list: _Optional[int] = ..., refused_release: _Optional[int] = ..., refusal: _Optional[str] = ..., report: _Optional[_Union[ReleaseReport, _Mapping]] = ..., tier: _Optional[str] = ...) -> None: ...

class ReleaseReport(_message.Message):
    __slots__ = ("release_id", "before_id", "examples", "correct", "correct_before", "loss_sum", "loss_sum_before", "went_back")
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    BEFORE_ID_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    CORRECT_FIELD_NUMBER: _ClassVar[int]
    CORRECT_BEFORE_FIELD_NUMBER: _ClassVar[int]
    LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    LOSS_SUM_BEFORE_FIELD_NUMBER: _ClassVar[int]
    WENT_BACK_FIELD_NUMBER: _ClassVar[int]
    release_id: int
    before_id: int
    examples: int
    correct: int
    correct_before: int
    loss_sum: float
    loss_sum_before: float
    went_back: bool
    def __init__(self, release_id: _Optional[int] = ..., before_id: _Optional[int] = ..., examples: _Optional[int] = ..., correct: _Optional[int] = ..., correct_before: _Optional[int] = ..., loss_sum: _Optional[float] = ..., loss_sum_before: _Optional[float] = ..., went_back: bool = ...) -> None: ...

class CheckInReply(_message.Message):
    __slots__ = ("assignment", "wait", "release", "keys")
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    assignment: Assignment
    wait: Wait
    release: _distribution_pb2.Release
    keys: _distribution_pb2.Signed
    def __init__(self, assignment: _Optional[_Union[Assignment, _Mapping]] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ..., release: _Optional[_Union[_distribution_pb2.Release, _Mapping]] = ..., keys: _Optional[_Union[_distribution_pb2.Signed, _Mapping]] = ...) -> None: ...

class Wait(_message.Message):
    __slots__ = ("retry_after_s", "reason")
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    retry_after_s: float
    reason: str
    def __init__(self, retry_after_s: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("id", "kind", "run", "round", "artifact_version", "trainable_set", "parameters_digest", "parameters_bytes", "config", "lease_s", "deadline_s", "form")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Assignment.Kind]
        TRAIN: _ClassVar[Assignment.Kind]
        EVALUATE: _ClassVar[Assignment.Kind]
    KIND_UNSPECIFIED: Assignment.Kind
    TRAIN: Assignment.Kind
    EVALUATE: Assignment.Kind
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_VERSION_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_SET_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    FORM_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: Assignment.Kind
    run: int
    round: int
    artifact_version: str
    trainable_set: str
    parameters_digest: str
    parameters_bytes: int
    config: TrainConfig
    lease_s: float
    deadline_s: float
    form: UpdateForm
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[_Union[Assignment.Kind, str]] = ..., run: _Optional[int] = ..., round: _Optional[int] = ..., artifact_version: _Optional[str] = ..., trainable_set: _Optional[str] = ..., parameters_digest: _Optional[str] = ..., parameters_bytes: _Optional[int] = ..., config: _Optional[_Union[TrainConfig, _Mapping]] = ..., lease_s: _Optional[float] = ..., deadline_s: _Optional[float] = ..., form: _Optional[_Union[UpdateForm, _Mapping]] = ...) -> None: ...

class UpdateForm(_message.Message):
    __slots__ = ("codec", "clip_norm", "noise", "private", "metrics", "frozen", "lora_rank")
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    codec: str
    clip_norm: float
    noise: float
    private: _containers.RepeatedScalarFieldContainer[str]
    metrics: _containers.RepeatedScalarFieldContainer[str]
    frozen: _containers.RepeatedScalarFieldContainer[str]
    lora_rank: int
    def __init__(self, codec: _Optional[str] = ..., clip_norm: _Optional[float] = ..., noise: _Optional[float] = ..., private: _Optional[_Iterable[str]] = ..., metrics: _Optional[_Iterable[str]] = ..., frozen: _Optional[_Iterable[str]] = ..., lora_rank: _Optional[int] = ...) -> None: ...

class TrainConfig(_message.Message):
    __slots__ = ("epochs", "batch_size", "learning_rate", "optimizer", "momentum", "weight_decay", "max_grad_norm", "proximal_mu", "seed", "max_length", "max_steps", "schedule", "warmup", "label_smoothing", "holdout", "patience")
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    PROXIMAL_MU_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    WARMUP_FIELD_NUMBER: _ClassVar[int]
    LABEL_SMOOTHING_FIELD_NUMBER: _ClassVar[int]
    HOLDOUT_FIELD_NUMBER: _ClassVar[int]
    PATIENCE_FIELD_NUMBER: _ClassVar[int]
    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: str
    momentum: float
    weight_decay: float
    max_grad_norm: float
    proximal_mu: float
    seed: int
    max_length: int
    max_steps: int
    schedule: str
    warmup: float
    label_smoothing: float
    holdout: float
    patience: int
    def __init__(self, epochs: _Optional[int] = ..., batch_size: _Optional[int] = ..., learning_rate: _Optional[float] = ..., optimizer: _Optional[str] = ..., momentum: _Optional[float] = ..., weight_decay: _Optional[float] = ..., max_grad_norm: _Optional[float] = ..., proximal_mu: _Optional[float] = ..., seed: _Optional[int] = ..., max_length: _Optional[int] = ..., max_steps: _Optional[int] = ..., schedule: _Optional[str] = ..., warmup: _Optional[float] = ..., label_smoothing: _Optional[float] = ..., holdout: _Optional[float] = ..., patience: _Optional[int] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("assignment_id", "phase", "progress")
    class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PHASE_UNSPECIFIED: _ClassVar[HeartbeatRequest.Phase]
        DOWNLOADING: _ClassVar[HeartbeatRequest.Phase]
        TRAINING: _ClassVar[HeartbeatRequest.Phase]
        UPLOADING: _ClassVar[HeartbeatRequest.Phase]
    PHASE_UNSPECIFIED: HeartbeatRequest.Phase
    DOWNLOADING: HeartbeatRequest.Phase
    TRAINING: HeartbeatRequest.Phase
    UPLOADING: HeartbeatRequest.Phase
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    assignment_id: str
    phase: HeartbeatRequest.Phase
    progress: float
    def __init__(self, assignment_id: _Optional[str] = ..., phase: _Optional[_Union[HeartbeatRequest.Phase, str]] = ..., progress: _Optional[float] = ...) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ("cancelled",)
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    cancelled: bool
    def __init__(self, cancelled: bool = ...) -> None: ...

class UploadStatusRequest(_message.Message):
    __slots__ = ("assignment_id",)
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    assignment_id: str
    def __init__(self, assignment_id: _Optional[str] = ...) -> None: ...

class UploadStatusReply(_message.Message):
    __slots__ = ("received_bytes", "receipt")
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    received_bytes: int
    receipt: Receipt
    def __init__(self, received_bytes: _Optional[int] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ...) -> None: ...

class UploadPart(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: UploadHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[UploadHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadHeader(_message.Message):
    __slots__ = ("assignment_id", "total_bytes", "digest", "offset", "num_examples", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    assignment_id: str
    total_bytes: int
    digest: str
    offset: int
    num_examples: int
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, assignment_id: _Optional[str] = ..., total_bytes: _Optional[int] = ..., digest: _Optional[str] = ..., offset: _Optional[int] = ..., num_examples: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("assignment_id", "accepted", "reason")
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    assignment_id: str
    accepted: bool
    reason: str
    def __init__(self, assignment_id: _Optional[str] = ..., accepted: bool = ..., reason: _Optional[str] = ...) -> None: ...

class DeclineRequest(_message.Message):
    __slots__ = ("assignment_id", "reason")
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    assignment_id: str
    reason: str
    def __init__(self, assignment_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class DeclineReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
