"""Pretrained weights as local files, from the cache or downloaded."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import huggingface_hub
import torch
from huggingface_hub import constants

from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import make_folder
from cifar_dist.utils.network import RESPONSE_SECONDS, responds


def fetch_weights(cfg: Any, backbone: str) -> Path:
    """Return the local file of the weights of timm's `cfg`, downloaded if it is not cached.

    Makes no network request for a cached file. Raises UserError within seconds if the server is
    unreachable, where the hub's client would retry for half a minute.
    """
    remedy = (
        "build this model once on a machine with network and copy its cache "
        f"({constants.HF_HUB_CACHE}), or set model.weights=PATH, or model.pretrained=false"
    )
    if cfg.hf_hub_id:
        repository, _, revision = cfg.hf_hub_id.partition("@")
        names = weight_names(cfg.hf_hub_filename or "pytorch_model.bin")
        for name in names:
            cached = huggingface_hub.try_to_load_from_cache(
                repository, name, revision=revision or None
            )
            if isinstance(cached, str):
                return Path(cached)
        address = constants.ENDPOINT
    elif cfg.url:
        file = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(urlparse(cfg.url).path))
        if file.is_file():
            return file
        address = cfg.url
    else:
        raise UserError(
            f"model.pretrained: timm has no weights for {backbone}; set model.weights=PATH "
            "or model.pretrained=false"
        )

    problem = f"model.pretrained: the weights of {backbone} are not in the cache and"
    if constants.HF_HUB_OFFLINE or not is_reachable(address):
        raise UserError(f"{problem} {urlparse(address).netloc} cannot be reached; {remedy}")
    try:
        if not cfg.hf_hub_id:
            make_folder(file.parent)
            torch.hub.download_url_to_file(cfg.url, str(file), progress=False)
            return file
        available = set(huggingface_hub.list_repo_files(repository, revision=revision or None))
        name = next(name for name in names if name in available)
        return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision or None))
    except Exception as error:  # the hub's errors share no base class across its versions
        raise UserError(f"{problem} the download failed ({error}); {remedy}") from error


def is_reachable(address: str) -> bool:
    """Return whether the server of a URL answers within 3 seconds, through a proxy if one is set."""

    def request() -> None:
        with suppress(HTTPError):  # an HTTP error is an answer, too
            urlopen(Request(address, method="HEAD"), timeout=RESPONSE_SECONDS).close()

    return responds(request)


def weight_names(name: str) -> tuple[str, ...]:
    """Return the file names to try on the hub; like timm, safetensors before pickles."""
    safe = "model.safetensors" if name == "pytorch_model.bin" else f"{Path(name).stem}.safetensors"
    return (safe, name) if name.endswith(".bin") else (name,)
