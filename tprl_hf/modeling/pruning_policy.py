"""The pruning policy: shared attention, policy head and value head (eq. 9-13, 17-18 of the TPRL paper)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_tprl import refuse_uneven_heads
from .policy_linear import PolicyLinear
from .token_autoencoder import Float32Module, in_own_precision

NUM_FREQUENCIES = 4  # of the place in an image, whose sides are 1
NUM_WORD_FREQUENCIES = 6  # of the place in a question
MAX_WORDS = 64  # words that the slowest of them tells apart
WORD_EPS = 1e-8  # word embeddings have variances of 1e-4 and less
NUM_WORD_SHARES = 4  # ways to weigh the words of a question
SIMILARITY_SCALE = 10.0  # cosines of visual tokens and words differ by a tenth


@dataclass
class PolicyOutput:
    """What the policy says about one step.

    Args:
        logits (float32 `[B, N]`): log-odds of keeping each token; `p_i = sigmoid(logits)` (eq. 13). Meaningless where
            the token is no longer kept.
        values (float32 `[B]`): estimated return from here on (eq. 18).
    """

    logits: Tensor
    values: Tensor


class ResidualMLP(nn.Module):
    """`LayerNorm(x + W2 GELU(W1 x))`: the body of both heads (eq. 11 and 17)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.linear_in = PolicyLinear(dim, hidden_dim)
        self.act = nn.GELU()
        self.linear_out = PolicyLinear(hidden_dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear_out(self.act(self.linear_in(x))))


class AttentionBlock(nn.Module):
    """`LayerNorm(x + Attention(x))` (eq. 9-10); with `hidden_dim` an MLP follows, for stacks of several layers."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv_proj = PolicyLinear(dim, 3 * dim)
        self.out_proj = PolicyLinear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = ResidualMLP(dim, hidden_dim) if hidden_dim is not None else nn.Identity()

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv_proj(x).view(batch, length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (3, B, heads, S, head_dim)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None, None])
        attended = self.out_proj(attended.transpose(1, 2).reshape(batch, length, dim))
        return self.mlp(self.norm(x + attended))


class PruningPolicy(Float32Module):
    """Says for each visual token that is still kept how likely it should stay, given the question.

    With the defaults it is the paper's network: one attention layer over `[Z_t ; Linear(q)]`, without positions.

    Args:
        latent_dim (`int`): width Z of the codes, also the width of the attention.
        token_dim (`int`): width D of the query's word embeddings.
        hidden_dim (`int`, defaults to 512): width inside the heads' MLPs.
        num_heads (`int`, defaults to 8): attention heads.
        num_layers (`int`, defaults to 1): attention layers; the paper has one.
        use_positions (`bool`, defaults to `False`): add a projection of each token's place in its image, and of each
            word's place in the question. Not in the paper, whose policy tells tokens apart by their codes alone.
        num_steps (`int`, *optional*): add an embedding of the step, for so many steps. Not in the paper.
        use_budget (`bool`, defaults to `False`): add an embedding of the fraction to be kept. Not in the paper.
        use_input_norm (`bool`, defaults to `False`): LayerNorm of codes and words before attention. Not in the paper.
            Word embeddings are often tens of times smaller than the codes, and then the policy does not read them.
        use_similarity (`bool`, defaults to `False`): add an embedding of each token's similarity to the words of the
            question, see [`SimilarityEmbedding`]. Not in the paper.
    """

    def __init__(
        self,
        latent_dim: int,
        token_dim: int,
        hidden_dim: int = 512,
        num_heads: int = 8,
        num_layers: int = 1,
        use_positions: bool = False,
        num_steps: int | None = None,
        use_budget: bool = False,
        use_input_norm: bool = False,
        use_similarity: bool = False,
    ):
        super().__init__()
        refuse_uneven_heads(latent_dim, num_heads)
        self.code_norm = nn.LayerNorm(latent_dim, WORD_EPS) if use_input_norm else nn.Identity()
        self.query_norm = nn.LayerNorm(token_dim, WORD_EPS) if use_input_norm else nn.Identity()
        self.query_proj = PolicyLinear(token_dim, latent_dim)
        self.position_proj = PolicyLinear(4 * NUM_FREQUENCIES, latent_dim) if use_positions else None
        self.word_proj = PolicyLinear(2 * NUM_WORD_FREQUENCIES, latent_dim) if use_positions else None
        self.budget_proj = BudgetEmbedding(latent_dim) if use_budget else None
        self.similarity_proj = SimilarityEmbedding(token_dim, latent_dim) if use_similarity else None
        self.step_embedding = nn.Embedding(num_steps, latent_dim) if num_steps is not None else None
        last = num_layers - 1
        self.layers = nn.ModuleList(
            AttentionBlock(latent_dim, num_heads, hidden_dim if i < last else None) for i in range(num_layers)
        )
        self.policy_mlp = ResidualMLP(latent_dim, hidden_dim)
        self.policy_head = PolicyLinear(latent_dim, 1)
        self.value_mlp = ResidualMLP(latent_dim, hidden_dim)
        self.value_head = PolicyLinear(latent_dim, 1)

    @classmethod
    def of(cls, config: Any) -> "PruningPolicy":
        """The network that a [`TPRLConfig`] describes, with new weights."""
        return cls(
            config.latent_dim,
            config.token_dim,
            config.policy_dim,
            config.policy_num_heads,
            config.policy_num_layers,
            config.policy_positions,
            config.policy_steps,
            config.policy_budget,
            config.policy_input_norm,
            config.policy_similarity,
        )

    @in_own_precision
    def forward(
        self,
        codes: Tensor,
        keep_mask: Tensor,
        query: Tensor | None = None,
        query_valid: Tensor | None = None,
        step: int = 0,
        positions: Tensor | None = None,
        keep_ratio: Tensor | None = None,
        similarity: Tensor | None = None,
    ) -> PolicyOutput:
        """
        Args:
            codes (`[B, N, Z]`): codes of all tokens; original indices never move.
            keep_mask (`bool [B, N]`): tokens still kept at this step; False also for padding. Only these are seen.
            query (`[B, Q, D]`, *optional*): word embeddings of the question.
            query_valid (`bool [B, Q]`, *optional*): False for padding of the query.
            step (`int`, defaults to 0): index t of this step.
            positions (`[B, N, 2]`, *optional*): row and column of each token in its image, both in [0, 1].
            keep_ratio (`[B]`, *optional*): fraction of all tokens that is to be left in the end; 1 where there is no
                such budget.
            similarity (`[B, N, Q]`, *optional*): cosine of each token with each word, for a policy that reads it.

        Returns:
            [`PolicyOutput`] with `logits [B, N]` and `values [B]`.
        """
        features = self.features(codes, keep_mask, query, query_valid, step, positions, keep_ratio, similarity)
        kept = keep_mask[..., None].to(features.dtype)
        pooled = (features * kept).sum(1) / kept.sum(1).clamp(min=1)
        return PolicyOutput(self.logits(features), self.value_head(self.value_mlp(pooled)).squeeze(-1))

    @in_own_precision
    def logits(self, features: Tensor) -> Tensor:
        """Log-odds of keeping each token, float32 `[B, N]`, from [`features`]: all that pruning needs."""
        return self.policy_head(self.policy_mlp(features)).squeeze(-1)

    @in_own_precision
    def features(
        self,
        codes: Tensor,
        keep_mask: Tensor,
        query: Tensor | None = None,
        query_valid: Tensor | None = None,
        step: int = 0,
        positions: Tensor | None = None,
        keep_ratio: Tensor | None = None,
        similarity: Tensor | None = None,
    ) -> Tensor:
        """What attention makes of each token, f_i of eq. 10: float32 `[B, N, Z]`. Arguments as in [`forward`]."""
        x = self.code_norm(codes.float())
        num_tokens = x.shape[1]
        if self.position_proj is not None:
            if positions is None:
                raise ValueError("This policy was built with use_positions=True and needs `positions` [B, N, 2].")
            x = x + self.position_proj(octaves(positions.float(), NUM_FREQUENCIES).flatten(-2))
        if self.step_embedding is not None:
            last = self.step_embedding.num_embeddings - 1
            index = torch.full((), min(step, last), dtype=torch.long, device=x.device)
            x = x + self.step_embedding(index)  # called, as weights that are offloaded come with the call
        if self.budget_proj is not None and keep_ratio is not None:
            x = x + self.budget_proj(keep_ratio)
        seen = keep_mask
        if query is not None and query.shape[1] > 0:
            attended = query.new_ones(query.shape[:2]) if query_valid is None else query_valid
            if self.similarity_proj is not None:
                if similarity is None:
                    raise ValueError("This policy has use_similarity=True and needs `similarity` [B, N, Q].")
                x = x + self.similarity_proj(similarity, query.float(), attended.bool())
            words = self.query_proj(self.query_norm(query.float()))
            if self.word_proj is not None:
                place = (attended.long().cumsum(1) - 1).clamp(min=0)
                words = words + self.word_proj(octaves(place.float() / MAX_WORDS, NUM_WORD_FREQUENCIES))
            x = torch.cat([x, words], dim=1)  # (B, N + L, Z)
            seen = torch.cat([seen, attended.bool()], dim=1)
        # a sample with nothing to see (a text-only one without a query) would give NaN
        seen = seen | ~seen.any(dim=1, keepdim=True)
        for layer in self.layers:
            x = layer(x, seen)
        return x[:, :num_tokens]


class BudgetEmbedding(nn.Module):
    """A vector for each budget, zero where everything is kept: `[B]` to `[B, 1, Z]`."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear_in = PolicyLinear(1, dim, bias=False)
        self.linear_out = PolicyLinear(dim, dim, bias=False)

    def forward(self, keep_ratio: Tensor) -> Tensor:
        return self.linear_out(self.linear_in(keep_ratio.float().log()[:, None]).tanh())[:, None]


class SimilarityEmbedding(nn.Module):
    """
    A vector for each token from its cosines with the words of the question: the largest of them, and means over the
    words, whose weights are learned. The projector brings visual tokens into the space of word embeddings, where a
    thing is often near to its name.
    """

    def __init__(self, token_dim: int, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(token_dim, WORD_EPS)
        self.word_weights = PolicyLinear(token_dim, NUM_WORD_SHARES)
        self.linear_in = PolicyLinear(NUM_WORD_SHARES + 1, dim)
        self.linear_out = PolicyLinear(dim, dim)

    def forward(self, similarity: Tensor, query: Tensor, query_valid: Tensor) -> Tensor:
        """
        Args:
            similarity (`[B, N, Q]`), query (`[B, Q, D]`), query_valid (`bool [B, Q]`): as the policy gets them.

        Returns:
            `[B, N, Z]`; zero for a sample without words.
        """
        hidden = ~query_valid
        shares = self.word_weights(self.norm(query)).masked_fill(hidden[..., None], -1e9).softmax(1)
        means = similarity.masked_fill(hidden[:, None], 0.0) @ shares  # (B, N, shares)
        largest = similarity.masked_fill(hidden[:, None], -1.0).amax(2, keepdim=True)
        found = self.linear_out(F.gelu(self.linear_in(SIMILARITY_SCALE * torch.cat([largest, means], dim=2))))
        return found * query_valid.any(1)[:, None, None]


@in_own_precision
def cosines(tokens: Tensor, words: Tensor) -> Tensor:
    """Of each token `[B, N, D]` with each word `[B, Q, D]`: float32 `[B, N, Q]`."""
    return F.normalize(tokens.float(), dim=-1) @ F.normalize(words.float(), dim=-1).transpose(1, 2)


def octaves(places: Tensor, num_frequencies: int) -> Tensor:
    """Sine and cosine at `num_frequencies` octaves of places in [0, 1]: `[...]` to `[..., 2 * num_frequencies]`."""
    factors = 2.0 ** torch.arange(num_frequencies, dtype=torch.float32, device=places.device)
    angles = places[..., None] * torch.pi * factors
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
