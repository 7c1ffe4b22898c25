"""VMamba: the original's numbers and layouts, the scan block against its definition, every variant, loading."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.golden import DATA, fill_, rel_error, tensor
from torch import nn

from clever.models.weights import load_backbone_file
from vmamba import VSSMConfig, build_vssm
from vmamba.model import MLP, PatchMerging
from vmamba.scan_reference import selective_scan_reference
from vmamba.selective_scan import BACKENDS, selective_scan_2d
from vmamba.ss2d import SS2D

VMAMBA = json.loads((DATA / "vmamba.json").read_text())
TINY = "vssm2-vmambav2_tiny_224"
LAYOUTS = {
    TINY: VMAMBA["vssm_tiny_keys"],
    "vssm2-vmambav2_small_224": VMAMBA["other_models"]["vssm2/vmambav2_small_224"]["keys"],
    "vssm2-vmambav2_base_224": VMAMBA["other_models"]["vssm2/vmambav2_base_224"]["keys"],
    "vssm2-vmambav2_tiny_s2l5_224": VMAMBA["other_models"]["released_tiny_s2l5"]["keys"],
    "vssm-vmamba_tiny_224": VMAMBA["other_models"]["released_vanilla_tiny"]["keys"],
}
SMALL = VSSMConfig(
    depths=(1, 2, 1), embed_dim=16, ssm_d_state=1, ssm_ratio=1.0, ssm_conv_bias=False, ssm_forwardtype="v05_noz",
    norm_layer="ln2d", downsample="v3",
)  # fmt: skip
IMAGES = tensor("image.33x47", (2, 3, 33, 47))
VARIANTS = [
    {},
    {"norm_layer": "bn", "downsample": "v1", "patchembed": "v1"},
    {"gmlp": True},
    {"ssm_forwardtype": "v0", "norm_layer": "ln", "ssm_ratio": 2.0},
    {"ssm_d_state": 16, "ssm_conv_bias": True},
    {"ssm_dt_rank": 3, "ssm_ratio": 1.5, "embed_dim": (8, 24, 20)},
]


def small(**changes):
    torch.manual_seed(0)
    return build_vssm(replace(SMALL, **changes), drop_path_rate=0.0)


def blocks_of(network):
    return [block for layer in network.layers for block in layer.blocks]


# --- the original's numbers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    return load_file(DATA / "vmamba.safetensors")


@pytest.fixture(scope="module")
def filled():
    return fill_(build_vssm(TINY)).eval()


@pytest.fixture(params=["torch", "cpp", pytest.param("triton", marks=pytest.mark.slow)])
def tiny(filled, request):
    """VMamba-Tiny with every scan by one backend; Triton is interpreted where there is no GPU."""
    reason = BACKENDS[request.param].unavailable_reason(torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)
    for module in filled.modules():
        if isinstance(module, SS2D):
            module.backend = request.param
    filled.zero_grad()
    return filled


def test_golden_at_96_pixels_module_by_module_and_gradients(tiny, golden):
    key, errors, hooks = "vssm_tiny.96x96", {}, []
    for name, module in tiny.named_modules():
        expected = golden.get(f"{key}.after.{name}")
        if expected is not None:

            def compare(module, inputs, output, name=name, expected=expected):
                errors[name] = rel_error(output.mean(dim=(1, 2)), expected)

            hooks.append(module.register_forward_hook(compare))
    features = tiny(tensor("image.96x96", (2, 3, 96, 96)))
    for hook in hooks:
        hook.remove()
    assert len(errors) == 7 and max(errors.values()) < 1e-4, errors
    assert rel_error(features, golden[f"{key}.features"]) < 1e-4

    features.pow(2).sum().backward()
    gradients = [name for name in golden if name.startswith(f"{key}.grad.")]
    assert len(gradients) == 6
    for name in gradients:
        parameter = tiny.get_parameter(name.removeprefix(f"{key}.grad."))
        assert rel_error(parameter.grad, golden[name]) < 1e-3, name


@torch.no_grad()
def test_golden_at_224_pixels(tiny, golden):
    assert rel_error(tiny(tensor("image.224x224", (2, 3, 224, 224))), golden["vssm_tiny.224x224.features"]) < 1e-4


@pytest.mark.parametrize("arch", LAYOUTS)
def test_names_and_shapes_are_the_originals(arch):
    with torch.device("meta"):
        network = build_vssm(arch)
    own = [[name, list(value.shape)] for name, value in network.state_dict().items()]
    expected = [entry for entry in LAYOUTS[arch] if not entry[0].startswith("classifier.head.")]
    if arch.startswith("vssm2"):  # the order too: optimizers store their state by position
        assert own == expected
    assert sorted(own) == sorted(expected)
    assert network.embed_dim == expected[-1][1][0]
    if arch == TINY:
        assert sum(p.numel() for p in network.parameters()) == VMAMBA["vssm_tiny_params_without_head"] == 29_480_064


# --- parts, against their definition -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("forward_type", ["v0", "v05", "v05_noz"])
def test_scan_block_equals_its_definition(forward_type):
    """The definition: channels first, one direction after another."""
    B, C, H, W, N, R = 2, 32, 3, 5, 2, 2
    op = fill_(SS2D(C, N, ratio=1.5, conv_bias=True, forward_type=forward_type))
    D, weights = 48, op.state_dict()
    images = tensor("ss2d.x", (B, H, W, C))

    x = torch.einsum("bhwc,dc->bdhw", images, weights["in_proj.weight"])
    if forward_type != "v05_noz":
        x, z = x.split(D, dim=1)
    x = F.silu(F.conv2d(x, weights["conv2d.weight"], weights["conv2d.bias"], padding=1, groups=D))
    rows = [(i, j) for i in range(H) for j in range(W)]
    columns = [(i, j) for j in range(W) for i in range(H)]
    total = torch.zeros(B, D, H, W)
    for k, order in enumerate([rows, columns, rows[::-1], columns[::-1]]):
        u = torch.stack([x[:, :, i, j] for i, j in order], dim=-1)  # [B, D, L]
        dt, b, c = (weights["x_proj_weight"][k] @ u).split([R, N, N], dim=1)
        delta = weights["dt_projs_weight"][k] @ dt
        A, Ds = -weights["A_logs"].exp()[k * D : (k + 1) * D], weights["Ds"][k * D : (k + 1) * D]
        y = selective_scan_reference(u, delta, A, b[:, None], c[:, None], Ds, weights["dt_projs_bias"][k])
        for step, (i, j) in enumerate(order):
            total[:, :, i, j] += y[:, :, step]
    y = F.layer_norm(total.permute(0, 2, 3, 1), (D,), weights["out_norm.weight"], weights["out_norm.bias"], eps=1e-5)
    if forward_type != "v05_noz":
        y = y * F.silu(z).permute(0, 2, 3, 1)
    assert rel_error(op(images), y @ weights["out_proj.weight"].T) < 1e-5


@torch.no_grad()
def test_initialisation():
    torch.manual_seed(0)
    op = SS2D(160, d_state=3, ratio=2.0, forward_type="v05")
    dt = F.softplus(op.dt_projs_bias)
    assert 0.001 <= dt.min() < 0.0015 and 0.07 < dt.max() <= 0.1001
    assert dt.log().mean().item() == pytest.approx(math.log(0.01), abs=0.2)  # log-uniform
    assert torch.allclose(op.A_logs.exp(), torch.tensor([1.0, 2.0, 3.0]).expand(4 * 320, 3))
    assert torch.equal(op.Ds, torch.ones(4 * 320))
    assert op.dt_projs_weight.abs().max().item() == pytest.approx(10**-0.5, rel=0.01)
    assert op.x_proj_weight.abs().max().item() == pytest.approx(320**-0.5, rel=0.01)


@torch.no_grad()
def test_gated_mlp():
    mlp = fill_(MLP(4, 3, "gelu", gated=True))
    assert mlp.fc1.weight.shape == (6, 4) and mlp.fc2.weight.shape == (4, 3)
    x = tensor("mlp.x", (2, 3, 5, 4))
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    expected = (hidden[..., :3] * F.gelu(hidden[..., 3:])) @ mlp.fc2.weight.T + mlp.fc2.bias
    assert rel_error(mlp(x), expected) < 1e-6


@torch.no_grad()
def test_patch_merging_order_and_padding():
    merge = PatchMerging(1, 4, nn.LayerNorm)
    merge.norm, merge.reduction = nn.Identity(), nn.Identity()
    x = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])[None, :, :, None]
    expected = [[[1.0, 4, 2, 5], [3, 6, 0, 0]], [[7, 0, 8, 0], [9, 0, 0, 0]]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmamba.model.normalize", lambda norm, x: x)
        assert torch.equal(merge(x), torch.tensor([expected]))


def test_drop_path_rises_linearly_to_the_configs_rate():
    network = build_vssm(replace(SMALL, drop_path_rate=0.3))
    assert [block.drop_path.p for block in blocks_of(network)] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert all(block.drop_path.p == 0 for block in blocks_of(build_vssm(SMALL, drop_path_rate=0.0)))
    assert blocks_of(build_vssm(SMALL, 0.6))[1].drop_path.p == pytest.approx(0.2)


# --- every variant -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_variant_runs_forward_and_backward(changes):
    """With an odd size that is not square. Every parameter has a gradient that is not zero."""
    network = small(**changes).train()
    features = network(IMAGES)
    assert features.shape == (2, network.embed_dim) and features.isfinite().all()
    (features * tensor("variant.weights", features.shape)).sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.parametrize("norm", ["ln2d", "bn"])
def test_checkpointing_changes_no_number(norm):
    results = []
    for checkpointing in (False, True):
        network = fill_(build_vssm(replace(SMALL, norm_layer=norm, ssm_drop_rate=0.1), 0.5, checkpointing)).train()
        torch.manual_seed(1)
        features = network(IMAGES)
        features.pow(2).sum().backward()
        state = network.state_dict()
        results.append([features, *(p.grad for p in network.parameters()), *(state[name] for name in sorted(state))])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*results, strict=True))


@pytest.mark.parametrize("forward_type", ["v0", "v05_noz"])
def test_autocast_keeps_the_scan_in_float32(forward_type, monkeypatch):
    network, calls = fill_(small(ssm_forwardtype=forward_type)).train(), []

    def scan(*tensors, backend):
        calls.append([each.dtype for each in tensors])
        return selective_scan_2d(*tensors, backend=backend)

    monkeypatch.setattr("vmamba.ss2d.selective_scan_2d", scan)
    exact = network(IMAGES).detach()
    with torch.autocast("cpu", torch.bfloat16):
        features = network(IMAGES)
    assert features.dtype == torch.float32 and rel_error(features, exact) < 0.02
    assert set(calls[-1][:2]) == {torch.float32 if forward_type == "v0" else torch.bfloat16}
    assert set(calls[-1][2:]) == {torch.float32}  # the parameters


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=str)
def test_a_network_in_half_precision(dtype, tolerance):
    """Converted as a whole, it computes and learns in its type."""
    network = fill_(small()).eval()
    exact = network(IMAGES).detach()
    features = network.to(dtype)(IMAGES.to(dtype))
    assert features.dtype == dtype and rel_error(features.float(), exact) < tolerance
    features.float().pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


# --- weights -----------------------------------------------------------------------------------------------------------


def as_old(state):
    """The names of the first release."""
    names = {r"^classifier\.": "", r"\.op\.": ".self_attention.", r"(blocks\.\d+)\.norm\.": r"\1.ln_1."}
    names |= {r"^patch_embed\.0": "patch_embed.proj", r"^patch_embed\.2": "patch_embed.norm"}
    for pattern, old in names.items():
        state = {re.sub(pattern, old, name): value for name, value in state.items()}
    return state


def with_classifier(state, width=64):
    return state | {"classifier.head.weight": torch.ones(1000, width), "classifier.head.bias": torch.ones(1000)}


def as_convolutions(state):
    linear = re.compile(r"(in_proj|out_proj|fc1|fc2|reduction)\.weight$")
    return {name: value[..., None, None] if linear.search(name) else value for name, value in state.items()}


FILES = [dict, as_convolutions, lambda state: as_old(with_classifier(state))]


@pytest.mark.parametrize("convert", FILES, ids=["own", "1x1", "old, classifier"])
def test_weights_of_every_layout_load(tmp_path, convert):
    changes = {"patchembed": "v1", "downsample": "v1"}
    source, path = fill_(small(**changes)), tmp_path / "released.pth"
    torch.save({"model": convert(source.state_dict())}, path)
    network, wrapped = small(**changes), nn.ModuleDict({"backbone": small(**changes)})
    load_backbone_file(network, str(path))
    wrapped.load_state_dict({f"backbone.{name}": value for name, value in convert(source.state_dict()).items()})
    for name, value in source.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
        assert torch.equal(wrapped["backbone"].state_dict()[name], value), name
