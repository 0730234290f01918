"""PointNet on the UCI digits in PyTorch: what `examples/train` has to reach, and is compared with.

    python -m venv /tmp/venv && /tmp/venv/bin/pip install -r examples/train/requirements.txt
    /tmp/venv/bin/python examples/train/reference.py train

`train` [--threads N] [--epochs N]
    trains with the seeds 0 to 4 as the example does, and prints each test accuracy and the mean.
`evaluate` CHECKPOINT
    loads the example's pointnet.safetensors, every tensor of it, and prints its test accuracy.
`data`
    makes digits.safetensors beside this script, from the copy in scikit-learn: `images` U8
    [1797, 8, 8], ink from 0 to 16; `labels` U8 [1797].
`fixture`
    makes tests/fixtures/train_example.safetensors: a small network and its first steps of training.
      before/{parameter}      F32, the network as it starts
      digits, maps            I64 [steps, batch] and F32 [steps, batch, 2, 3]: the batches
      losses, after/{parameter}   F64, computed in float64
      naive/losses, naive/{parameter}  F32, the same computed in float32
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

HERE = Path(__file__).resolve().parent
DIGITS = HERE / "digits.safetensors"
FIXTURE = HERE.parents[1] / "tests" / "fixtures" / "train_example.safetensors"

EPOCHS = 40
BATCH = 32
LEARNING_RATE = 3e-3
# The learning rate is halved every so many epochs.
HALVING = 8
# Of the fixture's Adam, instead of 1e-8. Where a channel of bn3 is positive in every cloud, bn4
# cancels its shift, whose gradient is then rounding and would be scaled up to a full step.
FIXTURE_EPS = 1e-4
# Training clouds are distorted: by up to so much in each element of a linear map, then moved by up
# to so much along each axis. A pixel is 2/7 wide.
DISTORTION = 0.15
SHIFT = 0.2


class PointNet(nn.Module):
    """Three layers that all points share, the maximum over the points of a cloud, two layers.

    After Qi et al. (2017), without the learned rotations, which these upright digits do not need.
    """

    def __init__(self, c1=64, c2=128, c3=256, hidden=128):
        super().__init__()
        self.conv1 = nn.Conv1d(3, c1, 1, bias=False)
        self.bn1 = nn.BatchNorm1d(c1)
        self.conv2 = nn.Conv1d(c1, c2, 1, bias=False)
        self.bn2 = nn.BatchNorm1d(c2)
        self.conv3 = nn.Conv1d(c2, c3, 1, bias=False)
        self.bn3 = nn.BatchNorm1d(c3)
        self.fc1 = nn.Linear(c3, hidden, bias=False)
        self.bn4 = nn.BatchNorm1d(hidden)
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, points, lengths):
        """`points` [1, 3, all points], cloud after cloud; no padding, which would enter the
        statistics of batch norm."""
        x = self.bn1(self.conv1(points)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.bn3(self.conv3(x)).relu()
        x = torch.stack([cloud.amax(1) for cloud in x[0].split(lengths, 1)])
        x = self.bn4(self.fc1(x)).relu()
        return self.fc2(x)


class Digits:
    def __init__(self):
        file = load_file(DIGITS)
        self.labels = file["labels"].long()
        self.clouds = [self.cloud(image) for image in file["images"]]
        index = torch.arange(len(self.labels))
        self.test = index[index % 5 == 0]
        self.training = index[index % 5 != 0]

    @staticmethod
    def cloud(image):
        """The inked pixels of a picture as [3, points]: x to the right and y down, -1 to 1; ink."""
        y, x = image.nonzero(as_tuple=True)
        ink = image[y, x].float() / 16
        return torch.stack([(x.float() - 3.5) / 3.5, (y.float() - 3.5) / 3.5, ink])

    def batch(self, digits, maps=None):
        """Points, lengths, labels. `maps` [batch, 2, 3] maps each cloud's (x, y, 1) to (x, y)."""
        clouds = [self.clouds[i] for i in digits]
        lengths = [cloud.shape[1] for cloud in clouds]
        points = torch.cat(clouds, 1)
        if maps is not None:
            maps = maps.repeat_interleave(torch.tensor(lengths), 0)
            points[:2] = torch.einsum("pij,jp->ip", maps[..., :2], points[:2]) + maps[..., 2].T
        return points[None], lengths, self.labels[digits]


def random_maps(shape):
    by = torch.tensor([DISTORTION, DISTORTION, SHIFT])
    return torch.eye(2, 3) + by * (2 * torch.rand(*shape, 2, 3) - 1)


def step(net, optimizer, points, lengths, labels):
    loss = nn.functional.cross_entropy(net(points, lengths), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def accuracy(net, data):
    net.eval()
    points, lengths, labels = data.batch(data.test)
    with torch.no_grad():
        right = net(points, lengths).argmax(1) == labels
    return 100 * right.double().mean().item()


def train(threads, epochs):
    torch.set_num_threads(threads)
    data = Digits()
    results = []
    for seed in range(5):
        start = time.time()
        torch.manual_seed(seed)
        net = PointNet()
        optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, HALVING, 0.5)
        for _ in range(epochs):
            net.train()
            order = data.training[torch.randperm(len(data.training))]
            # As many full batches as there are; what is left over comes in another epoch.
            for digits in order[: len(order) // BATCH * BATCH].split(BATCH):
                step(net, optimizer, *data.batch(digits, random_maps([BATCH])))
            schedule.step()
        results.append(accuracy(net, data))
        seconds = time.time() - start
        print(f"seed {seed}: test accuracy {results[-1]:.2f} %, {seconds:.0f} s", flush=True)
    print(f"mean over {len(results)} seeds: {sum(results) / len(results):.2f} %")


def evaluate(checkpoint):
    net = PointNet()
    net.load_state_dict(load_file(checkpoint))
    print(f"test accuracy {accuracy(net, Digits()):.1f} %")


def data():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8)
    assert images.shape == (1797, 8, 8) and (images.numpy() == digits.images).all()
    labels = torch.from_numpy(digits.target).to(torch.uint8)
    save_file({"images": images, "labels": labels}, DIGITS)
    print(f"{DIGITS}: {DIGITS.stat().st_size} bytes")


def fixture():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps, batch, digits = 5, 16, Digits()
    chosen = torch.stack([digits.training[torch.randperm(1437)[:batch]] for _ in range(steps)])
    tensors = {"digits": chosen, "maps": random_maps([steps, batch])}
    # Sizes that fill no vector; an affine that is not the identity.
    start = PointNet(13, 24, 37, 19)
    for norm in (start.bn1, start.bn2, start.bn3, start.bn4):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    before = {name: t.clone() for name, t in start.state_dict().items()}
    tensors |= {f"before/{name}": t for name, t in before.items()}
    for dtype, prefix, losses in [
        (torch.float64, "after/", "losses"),
        (torch.float32, "naive/", "naive/losses"),
    ]:
        net = PointNet(13, 24, 37, 19)
        net.load_state_dict(before)
        net.to(dtype)
        optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE, eps=FIXTURE_EPS)
        tensors[losses] = torch.empty(steps, dtype=dtype)
        for i in range(steps):
            points, lengths, labels = digits.batch(chosen[i], tensors["maps"][i])
            tensors[losses][i] = step(net, optimizer, points.to(dtype), lengths, labels)
        tensors |= {prefix + name: t for name, t in net.state_dict().items()}
    save_file(tensors, FIXTURE)
    print(f"{FIXTURE}: {FIXTURE.stat().st_size} bytes, losses {tensors['losses'].tolist()}")
    for name, t in before.items():
        after, naive = tensors[f"after/{name}"], tensors[f"naive/{name}"]
        print(f"{name}: moved {(after - t).abs().max():.2e}, off {(naive - after).abs().max():.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, dest="command")
    options = commands.add_parser("train")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--epochs", type=int, default=EPOCHS)
    commands.add_parser("evaluate").add_argument("checkpoint", type=Path)
    commands.add_parser("data")
    commands.add_parser("fixture")
    arguments = vars(parser.parse_args())
    {"train": train, "evaluate": evaluate, "data": data, "fixture": fixture}[
        arguments.pop("command")
    ](**arguments)


if __name__ == "__main__":
    main()
