"""The networks, against the paper's equations written out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from tprl_hf.modeling import PruningPolicy, TokenAutoencoder
from tprl_hf.modeling.pruning_policy import cosines


def mlp_norm(module, x):
    hidden = F.gelu(x @ module.linear_in.weight.T + module.linear_in.bias)
    return F.layer_norm(
        x + hidden @ module.linear_out.weight.T + module.linear_out.bias,
        x.shape[-1:],
        module.norm.weight,
        module.norm.bias,
    )


@torch.no_grad()
def test_policy_follows_the_equations():
    torch.manual_seed(0)
    policy = PruningPolicy(latent_dim=16, token_dim=12, hidden_dim=24, num_heads=2)
    codes, query = torch.randn(1, 5, 16), torch.randn(1, 3, 12)
    kept = torch.ones(1, 5, dtype=torch.bool)
    output = policy(codes, kept, query)

    block = policy.layers[0]
    x = torch.cat([codes, query @ policy.query_proj.weight.T + policy.query_proj.bias], 1)[0]  # [Z_t ; Linear(q)]
    heads = []
    q, k, v = (x @ block.qkv_proj.weight.T + block.qkv_proj.bias).chunk(3, -1)
    for h in range(2):
        part = slice(8 * h, 8 * h + 8)
        heads.append((q[:, part] @ k[:, part].T / math.sqrt(8)).softmax(-1) @ v[:, part])
    attended = torch.cat(heads, -1) @ block.out_proj.weight.T + block.out_proj.bias
    f = F.layer_norm(x + attended, (16,), block.norm.weight, block.norm.bias)[:5]  # eq. 9-10
    g = mlp_norm(policy.policy_mlp, f)  # eq. 11-12
    logits = g @ policy.policy_head.weight[0] + policy.policy_head.bias  # eq. 13
    value = mlp_norm(policy.value_mlp, f.mean(0)) @ policy.value_head.weight[0] + policy.value_head.bias  # eq. 17-18
    assert torch.allclose(output.logits[0], logits, atol=1e-5)
    assert torch.allclose(output.values, value, atol=1e-5)


@torch.no_grad()
def test_autoencoder_follows_the_equations():
    torch.manual_seed(0)
    autoencoder = TokenAutoencoder(token_dim=32, hidden_dim=8, latent_dim=2)
    tokens = torch.randn(2, 3, 32)
    first, norm, _, last = autoencoder.encoder
    hidden = F.gelu(F.layer_norm(first(tokens), (8,), norm.weight, norm.bias))
    codes, loss = autoencoder(tokens)
    assert torch.allclose(codes, last(hidden), atol=1e-6)
    assert torch.allclose(loss, ((autoencoder.decode(codes) - tokens) ** 2).mean(), atol=1e-6)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    _, masked = autoencoder(tokens.masked_fill(~valid[..., None], 1e4), valid)
    errors = ((autoencoder.decode(codes) - tokens) ** 2).mean(-1)
    assert torch.allclose(masked, errors[valid].mean(), atol=1e-6)
    assert autoencoder.encode(tokens.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("extended", [False, True])
@torch.no_grad()
def test_only_what_is_kept_is_seen(extended):
    torch.manual_seed(0)
    parts = {"use_positions": True, "num_steps": 3, "use_budget": True, "use_input_norm": True}
    parts["use_similarity"] = True
    more = {"num_layers": 2, **parts} if extended else {}
    policy = PruningPolicy(latent_dim=16, token_dim=12, hidden_dim=24, num_heads=2, **more)
    codes, query, places = torch.randn(2, 6, 16), torch.randn(2, 4, 12), torch.rand(2, 6, 2)
    near = torch.rand(2, 6, 4)
    kept = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 1, 1, 0, 0, 0]]).bool()
    asked = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]]).bool()
    output = policy(codes, kept, query, asked, 1, places, None, near)
    hidden = near.masked_fill(~kept[..., None] | ~asked[:, None], 7.0)
    strange, words = codes.masked_fill(~kept[..., None], 7.0), query.masked_fill(~asked[..., None], 7.0)
    other = policy(strange, kept, words, asked, 1, places, None, hidden)
    assert torch.allclose(output.logits[kept], other.logits[kept], atol=1e-6)
    assert torch.allclose(output.values, other.values, atol=1e-6)
    left, where = near[:1, kept[0]][..., asked[0]], places[:1, kept[0]]
    alone = policy(codes[:1, kept[0]], kept[:1, kept[0]], query[:1, asked[0]], None, 1, where, None, left)
    assert torch.allclose(alone.logits[0], output.logits[0, kept[0]], atol=1e-5)
    assert torch.allclose(alone.values, output.values[:1], atol=1e-5)
    step = policy(codes, kept, query, asked, 2, places, None, near)
    assert torch.equal(step.logits, output.logits) != extended
    budget = policy(codes, kept, query, asked, 1, places, torch.tensor([0.1, 1.0]), near)
    assert torch.equal(budget.logits[0], output.logits[0]) != extended
    assert torch.allclose(budget.logits[1], output.logits[1], atol=1e-6)  # to keep everything is no budget
    other_order = policy(codes, kept, query.flip(1), asked.flip(1), 1, places, None, near.flip(2))
    assert torch.allclose(other_order.logits[kept], output.logits[kept], atol=1e-5) != extended
    # order of the tokens is nothing to the paper's policy
    turned = policy(codes.flip(1), kept.flip(1), query, asked, 1, places.flip(1), None, near.flip(1))
    assert torch.allclose(turned.logits.flip(1)[kept], output.logits[kept], atol=1e-5)


@pytest.mark.parametrize("num_layers", [1, 2])
@torch.no_grad()
def test_small_word_embeddings_are_read(num_layers):
    """Those of pretrained LLMs are up to a hundred times smaller than the codes."""
    torch.manual_seed(0)
    sizes = {"latent_dim": 16, "token_dim": 12, "hidden_dim": 24, "num_heads": 2, "num_layers": num_layers}
    codes, words, everything = 3 * torch.randn(1, 9, 16), torch.randn(8, 4, 12), torch.ones(8, 9, dtype=torch.bool)

    def differences(policy, scale):
        logits = policy(codes.expand(8, -1, -1), everything, scale * words).logits
        return logits.std(0).mean().item() / logits.std(1).mean().item()  # over questions, over tokens

    plain, normed = PruningPolicy(**sizes), PruningPolicy(**sizes, use_input_norm=True)
    assert differences(plain, 0.01) < 0.1 * differences(plain, 1.0)
    assert differences(normed, 0.01) == pytest.approx(differences(normed, 1.0), rel=0.01)
    assert differences(normed, 0.01) > 5 * differences(plain, 0.01)
    loud, quiet = (normed(scale * codes, everything[:1], words[:1]).logits for scale in (1.0, 0.1))
    assert torch.allclose(loud, quiet, atol=1e-4)


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("num_words", [0, 2])
@torch.no_grad()
def test_nothing_to_see_is_no_nan(extended, num_words):
    parts = {"use_input_norm": extended, "use_similarity": extended}
    policy = PruningPolicy(latent_dim=16, token_dim=12, num_heads=2, **parts)
    nothing, words = torch.zeros(1, 3, dtype=torch.bool), torch.randn(1, num_words, 12)
    asked = torch.zeros(1, num_words, dtype=torch.bool)
    output = policy(torch.randn(1, 3, 16), nothing, words, asked, similarity=torch.rand(1, 3, num_words))
    assert output.logits.isfinite().all()
    assert output.values.isfinite().all()


def test_positions_are_asked_for():
    policy = PruningPolicy(latent_dim=16, token_dim=12, num_heads=2, use_positions=True)
    with pytest.raises(ValueError, match="needs `positions`"):
        policy(torch.randn(1, 3, 16), torch.ones(1, 3, dtype=torch.bool))


@torch.no_grad()
def test_similarity_is_read_and_asked_for():
    torch.manual_seed(0)
    policy = PruningPolicy(latent_dim=16, token_dim=12, num_heads=2, use_similarity=True)
    codes, query, every = torch.randn(2, 5, 16), torch.randn(2, 3, 12), torch.ones(2, 5, dtype=torch.bool)
    near = torch.rand(2, 5, 3)
    logits = policy(codes, every, query, similarity=near).logits
    assert not torch.allclose(policy(codes, every, query, similarity=near.flip(1)).logits, logits)
    asked = torch.tensor([[True, True, True], [False, False, False]])
    embedded = policy.similarity_proj(near, query, asked)
    assert embedded[0].abs().min() > 0 and not embedded[1].any()
    with pytest.raises(ValueError, match="needs `similarity`"):
        policy(codes, every, query)
    assert policy(codes, every).logits.isfinite().all()  # without a question there is nothing to be similar to


def test_cosines_do_not_depend_on_lengths():
    tokens, words = torch.randn(2, 4, 8), torch.randn(2, 3, 8)
    expected = F.cosine_similarity(tokens[:, :, None], words[:, None], dim=-1)
    assert torch.allclose(cosines(3 * tokens, 0.01 * words), expected, atol=1e-6)
    assert cosines(tokens.bfloat16(), words.bfloat16()).dtype == torch.float32
    assert not cosines(tokens, torch.zeros(2, 3, 8)).any()
