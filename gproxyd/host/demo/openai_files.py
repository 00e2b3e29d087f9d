"""OpenAI's files and batches, kept in memory. Shapes: OpenAI API reference, "Files" and "Batch"."""

from __future__ import annotations

from gproxyd.host.demo.answers import Answer, Object, VendorError, json, plain, pretty
from gproxyd.host.demo.call import CREATED, Call
from gproxyd.host.demo.form import KEEP

_DAY = 86_400


def upload(call: Call) -> Answer:
    """POST /v1/files (multipart): the content is hashed, and kept if it is not above 1 MiB."""
    part = call.part("file")
    kept = call.shelves.files.put(
        {
            "id": call.ident("file-", 24, f"{part.filename} {part.sha256}"),
            "object": "file",
            "bytes": part.size,
            "sha256": part.sha256,
            "created_at": CREATED,
            "expires_at": None,
            "filename": part.filename or "upload",
            "purpose": call.form_value("purpose", "user_data"),
            "status": "processed",
            "status_details": None,
        }
    )
    if part.size <= KEEP:
        call.shelves.contents.put({"id": kept["id"], "data": bytes(part.kept)})
    return pretty(kept)


def list_files(call: Call) -> Answer:
    """GET /v1/files, of one `purpose` if asked."""
    purpose = call.query.get("purpose")
    return _listing([each for each in call.shelves.files.values() if purpose in {None, each["purpose"]}])


def retrieve_file(call: Call) -> Answer:
    """GET /v1/files/{id}."""
    return pretty(call.shelves.files.take(call.place["id"]))


def delete_file(call: Call) -> Answer:
    """DELETE /v1/files/{id}."""
    gone = call.shelves.files.take(call.place["id"])
    del call.shelves.files[gone["id"]]
    call.shelves.contents.pop(gone["id"], None)
    return json({"id": gone["id"], "object": "file", "deleted": True})


def file_content(call: Call) -> Answer:
    """GET /v1/files/{id}/content."""
    kept = call.shelves.files.take(call.place["id"])
    return plain(call.shelves.contents.take(kept["id"])["data"], "application/octet-stream")


def create_batch(call: Call) -> Answer:
    """POST /v1/batches."""
    body = call.json()
    missing = next((name for name in ("input_file_id", "endpoint", "completion_window") if not body.get(name)), None)
    if missing is not None:
        raise VendorError(400, f"Missing required parameter: '{missing}'.", param=missing)
    batch: Object = {
        "id": call.ident("batch_"),
        "object": "batch",
        "endpoint": body["endpoint"],
        "errors": None,
        "input_file_id": body["input_file_id"],
        "completion_window": body["completion_window"],
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": CREATED,
        "in_progress_at": None,
        "expires_at": CREATED + _DAY,
        "cancelling_at": None,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": body.get("metadata"),
    }
    return pretty(call.shelves.batches.put(batch))


def list_batches(call: Call) -> Answer:
    """GET /v1/batches."""
    return _listing(list(call.shelves.batches.values()))


def retrieve_batch(call: Call) -> Answer:
    """GET /v1/batches/{id}: still being validated, however long one waits, unless it was cancelled."""
    return pretty(call.shelves.batches.take(call.place["id"]))


def cancel_batch(call: Call) -> Answer:
    """POST /v1/batches/{id}/cancel."""
    batch = call.shelves.batches.take(call.place["id"])
    batch |= {"status": "cancelling", "cancelling_at": CREATED}
    return pretty(batch)


def _listing(things: list[Object]) -> Answer:
    """A page that is the only one."""
    edges = {"first_id": things[0]["id"], "last_id": things[-1]["id"]} if things else {}
    return pretty({"object": "list", "data": things, "has_more": False, **edges})
