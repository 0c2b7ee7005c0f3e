"""The names and types of all columns that the pipeline reads and writes.

Most names are the names of Ray Data LLM, so that its users can switch. The columns that only we have are added to
them, and none is renamed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

DATA = "__data"
"""Column that holds a pickled row between our operators, so that its values keep their types."""

INPUT = "__input"
"""Column in which a job keeps the row as it was read, because its prompt may replace a column of the input."""

POSITION = "__position"
"""Position of a row in the input, as `binary(12)`: number of the file, then place in the file, both big-endian."""

ROW_ID = "__row_id"
"""Id of a row in the ledger, as `binary(12)`: its position, or a hash of its key."""

READ_ERROR = "__read_error"
"""Column with the reason why a piece of the input is not a row. It exists between reading and preparing."""

READ_ROW = "__read_row"
"""Column with the row as it was read, as text, if a value does not fit its column or the piece is no row."""

# Columns that a row may have before the first stage.
MESSAGES = "messages"
PROMPT = "prompt"
TOKENIZED_PROMPT = "tokenized_prompt"
SAMPLING_PARAMS = "sampling_params"
POOLING_PARAMS = "pooling_params"
TEXT_1, TEXT_2 = "text_1", "text_2"
QUERY, DOCUMENT, DOCUMENTS = "query", "document", "documents"
MODEL = "model"
TOOLS = "tools"
CHAT_TEMPLATE = "chat_template"
CHAT_TEMPLATE_KWARGS = "chat_template_kwargs"

READ_BY_STAGES = (MESSAGES, PROMPT, TOKENIZED_PROMPT, TOOLS, CHAT_TEMPLATE, CHAT_TEMPLATE_KWARGS)
"""Columns that the stages of a job look for in a row of the input."""

# Columns that a row brings to an HTTP endpoint or a deployment of Ray Serve, and columns of the answer.
PAYLOAD = "payload"
HTTP_RESPONSE = "http_response"
METHOD = "method"
REQUEST_KWARGS = "request_kwargs"
DTYPE = "dtype"
SERVE_TIME_TAKEN = "time_taken"

# Columns that an engine adds.
REQUEST_ID = "request_id"
BATCH_UUID = "batch_uuid"
TIME_TAKEN = "time_taken_llm"
PARAMS = "params"
PROMPT_TOKEN_IDS = "prompt_token_ids"
NUM_INPUT_TOKENS = "num_input_tokens"
GENERATED_TOKENS = "generated_tokens"
GENERATED_TEXT = "generated_text"
NUM_GENERATED_TOKENS = "num_generated_tokens"
EMBEDDINGS = "embeddings"
"""Vector of a row's prompt, or the scores of its classes; Ray Data LLM uses this name for both."""

EMBEDDING_SCALE = "embeddings_scale"
"""Number by which the codes in `embeddings` are multiplied, where `embedding_dtype` is int8 or uint8; else null."""

PROBS = "probs"
LABEL = "label"
LABEL_PROBABILITY = "label_probability"
SCORE = "score"
REWARD = "reward"
"""Answers of the tasks classify, score and reward, which Ray Data LLM puts into `embeddings`."""

METRICS = "metrics"
LOGPROBS = "logprobs"
PROMPT_LOGPROBS = "prompt_logprobs"
INFERENCE_ERROR = "__inference_error__"

# Columns that Ray Data LLM does not have.
FINISH_REASON = "finish_reason"
STOP_REASON = "stop_reason"
NUM_CACHED_TOKENS = "num_cached_tokens"
OUTPUTS = "outputs"
ATTEMPT = "attempt"
REPLICA_ID = "replica_id"
IS_DUPLICATE = "__is_duplicate"
"""Whether the row got the output of an identical row. The column exists only between generation and the sink."""

ADAPTER = "__adapter"
"""Name of the adapter that answered the row. The column exists only between generation and the sink."""

MARKS = (IS_DUPLICATE, ADAPTER)
"""Columns that only the pipeline reads, and that no result has."""

MORE_PROMPTS = "__more_prompts"
"""Further prompts of a row of a batch file. Their vectors are returned in one list after the vector of the first."""

# Columns that a dead letter has besides the columns of the row as it was read.
ERROR_STAGE = "__error_stage"
ERROR_KIND = "__error_kind"
ERROR_MESSAGE = "__error_message"
ERROR_RETRYABLE = "__error_retryable"
ERROR_ATTEMPTS = "__error_attempts"

# Columns of the stages that parse the answer (`reasoning_stage`, `tool_call_stage`).
CONTENT = "content"
REASONING_CONTENT = "reasoning_content"
TOOL_CALLS = "tool_calls"
TOOL_CALL_ERROR = "tool_call_error"

RESERVED = frozenset({
    DATA, INPUT, POSITION, ROW_ID, READ_ERROR, READ_ROW, *MARKS, MORE_PROMPTS,
    ERROR_STAGE, ERROR_KIND, ERROR_MESSAGE, ERROR_RETRYABLE, ERROR_ATTEMPTS,
})  # fmt: skip
"""Names that a column of the input cannot have, because the pipeline adds columns of these names to its rows."""

NO_ERROR = ""
"""Value of `__inference_error__` for a row without an error."""


def result_types() -> dict[str, pa.DataType]:
    """Returns the Arrow type of every column that generation writes with one type.

    An explicit type keeps a block in which every value is None (a block of failed rows) from becoming a column of
    nulls that no reader can join with the other blocks.
    """
    import pyarrow as pa

    logprob = pa.struct([("logprob", pa.float64()), ("rank", pa.int64()), ("decoded_token", pa.string())])
    logprobs = pa.list_(pa.map_(pa.int64(), logprob))
    function = pa.struct([("name", pa.string()), ("arguments", pa.string())])
    tool_calls = pa.list_(pa.struct([("id", pa.string()), ("type", pa.string()), ("function", function)]))
    answer = {
        CONTENT: pa.string(),
        REASONING_CONTENT: pa.string(),
        TOOL_CALLS: tool_calls,
        TOOL_CALL_ERROR: pa.string(),
    }
    sequence = pa.struct(
        [
            ("index", pa.int64()),
            ("text", pa.string()),
            ("token_ids", pa.list_(pa.int64())),
            ("finish_reason", pa.string()),
            ("stop_reason", pa.string()),
            ("cumulative_logprob", pa.float64()),
            ("logprobs", logprobs),
            *answer.items(),
        ]
    )
    return {
        REQUEST_ID: pa.string(),
        BATCH_UUID: pa.string(),
        TIME_TAKEN: pa.float64(),
        PARAMS: pa.string(),
        PROMPT_TOKEN_IDS: pa.list_(pa.int64()),
        NUM_INPUT_TOKENS: pa.int64(),
        GENERATED_TOKENS: pa.list_(pa.int64()),
        EMBEDDINGS: pa.list_(pa.float32()),
        EMBEDDING_SCALE: pa.float32(),
        GENERATED_TEXT: pa.string(),
        NUM_GENERATED_TOKENS: pa.int64(),
        INFERENCE_ERROR: pa.string(),
        FINISH_REASON: pa.string(),
        STOP_REASON: pa.string(),
        NUM_CACHED_TOKENS: pa.int64(),
        ATTEMPT: pa.int64(),
        REPLICA_ID: pa.string(),
        LOGPROBS: logprobs,
        PROMPT_LOGPROBS: logprobs,
        OUTPUTS: pa.list_(sequence),
        **answer,
    }


def error_types() -> dict[str, pa.DataType]:
    """Returns the Arrow types of the columns that a dead letter adds to its row."""
    import pyarrow as pa

    return {
        ROW_ID: pa.binary(12),
        ERROR_STAGE: pa.string(),
        ERROR_KIND: pa.string(),
        ERROR_MESSAGE: pa.string(),
        ERROR_RETRYABLE: pa.bool_(),
        ERROR_ATTEMPTS: pa.int64(),
    }
