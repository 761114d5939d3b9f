"""LMHead: what it reads off a model, and what it refuses."""

import pytest
import torch

from opcd_fast.loss import LMHead, same_vocabulary

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def tiny(family, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**TINY, **changes})
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def test_wrapped_models_are_unwrapped_and_adapters_on_the_head_refused():
    peft = pytest.importorskip("peft")
    model = tiny("Llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert LMHead.from_model(wrapped).weight is model.lm_head.weight
    assert LMHead.from_model(torch.compile(model)).weight is model.lm_head.weight
    assert LMHead.from_model(tiny("Granite", logits_scaling=8.0).bfloat16()).scale == 1 / 8
    for on_head in (
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        wrapped = peft.get_peft_model(tiny("Llama"), peft.LoraConfig(r=2, **on_head))
        with pytest.raises(ValueError, match=r"lm_head.*merge_and_unload"):
            LMHead.from_model(wrapped)


def partitioned():
    """As DeepSpeed ZeRO-3 leaves a parameter."""
    parameter = torch.nn.Parameter(torch.zeros(0))
    parameter.ds_shape = (5, 4)
    return parameter


def test_models_without_a_head_are_refused():
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        LMHead.from_model(tiny("Llama").model)
    with pytest.raises(ValueError, match="DataParallel.*forward"):
        LMHead.from_model(torch.nn.DataParallel(tiny("Llama")))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weight": torch.zeros(3)}, ["weight", "(3,)", "(V, D)"]),
        ({"weight": torch.zeros(3, 2, dtype=torch.int8)}, ["weight", "int8"]),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, ["bias", "(2,)", "(3,)"]),
        ({"weight": torch.zeros(3, 2), "softcap": 0.0}, ["softcap", "positive"]),
        ({"weight": torch.zeros(3, 2), "scale": float("nan")}, ["scale", "finite"]),
        ({"weight": torch.zeros(3, 2), "vocab_size": 4}, ["vocab_size", "4", "1..3"]),
        ({"weight": torch.zeros(3, 2), "group": "tp"}, ["group", "ProcessGroup"]),
        ({"weight": torch.zeros(3, 2), "scale": torch.tensor(2.0)}, ["scale", "float"]),
        ({"weight": torch.zeros(3, 2), "softcap": torch.tensor(2.0)}, ["softcap", "float"]),
        ({"weight": partitioned()}, ["ZeRO-3", "GatheredParameters"]),
    ],
)
def test_bad_heads_say_what_and_what_instead(arguments, words):
    with pytest.raises(ValueError) as error:
        LMHead(**arguments)
    assert all(word in str(error.value) for word in words), error.value


class Sketch(torch.nn.Module):
    """A causal LM reduced to what from_model looks at; subclasses change what happens around the head."""

    def __init__(self, bias=False):
        super().__init__()
        self.body, self.head = torch.nn.Embedding(12, 8), torch.nn.Linear(8, 12, bias=bias)

    base_model = property(lambda self: self.body)

    def get_decoder(self):
        return self.body

    def get_output_embeddings(self):
        return self.head

    def before(self, hidden):
        return hidden

    def after(self, logits):
        return logits

    def forward(self, input_ids):
        return (self.after(self.head(self.before(self.body(input_ids).last_hidden_state))),)


@pytest.mark.parametrize(
    ("changes", "bias", "reason"),
    [
        ({"after": lambda self, z: z.clamp(max=5)}, False, "changed after the head"),
        ({"after": lambda self, z: z + 1}, False, "changed after the head"),
        ({"after": lambda self, z: z.flip(-1)}, False, "changed after the head"),
        ({"after": lambda self, z: z[:, -1]}, False, "its logits are"),
        ({"before": lambda self, h: h.relu()}, False, "transformed before"),
        ({"before": lambda self, h: h.roll(1, 1)}, False, "transformed before"),
        ({"before": lambda self, h: h[:, -1:]}, False, "its head reads"),
        ({"before": lambda self, h: h / 2}, True, "before a head that has a bias"),
        ({"before": lambda self, h: self.nothing(h)}, False, "between its hidden states and its head"),
        ({"after": lambda self, z: z + self.head(z[..., :8])}, False, "output embeddings 2 times"),
        ({"forward": lambda self, input_ids: (self.head(torch.zeros(1, 3, 8)),)}, False, "its body 0 times"),
    ],
)
def test_what_cannot_be_expressed_is_refused_and_the_model_left_as_it_was(changes, bias, reason):
    model = type("Changed", (Sketch,), changes)(bias)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=reason):
        LMHead.from_model(model)
    assert dict(model.named_modules()) == before


def test_factors_before_and_after_the_head_are_one_scale():
    changes = {"before": lambda self, h: h / 4, "after": lambda self, z: 3 * torch.tanh(z * 2)[..., :10]}
    head = LMHead.from_model(type("Changed", (Sketch,), changes)())
    assert (head.scale, head.softcap, head.vocab_size) == (pytest.approx(1.5), pytest.approx(3.0), 10)
    with pytest.raises(ValueError, match="vocab_size is 11, but Changed has logits for 10 tokens"):
        LMHead.from_model(type("Changed", (Sketch,), changes)(), vocab_size=11)


def test_heads_that_are_no_plain_matrix_are_refused():
    model = Sketch()
    model.head.weight.data = model.head.weight.data.to(torch.float8_e4m3fn)  # its scales lie elsewhere
    with pytest.raises(ValueError, match="quantised"):
        LMHead.from_model(model)
    model.head = type("Scaled", (torch.nn.Linear,), {"forward": lambda self, x: x @ self.weight.T * 2})(8, 12)
    with pytest.raises(ValueError, match="Scaled"):
        LMHead.from_model(model)


def test_two_heads_of_one_vocabulary_and_a_head_of_another_type():
    short, long = LMHead(torch.zeros(5, 4), torch.zeros(5)), LMHead(torch.zeros(8, 4), scale=2.0)
    for student, teacher in ((short, long), (long, short)):
        pair = same_vocabulary(student, teacher)
        assert [head.valid_size for head in pair] == [5, 5]
        assert pair[0].weight is student.weight and pair[1].weight is teacher.weight and 2.0 in {x.scale for x in pair}
    assert same_vocabulary(short, short) == (short, short)
    half = short.to(torch.bfloat16)
    assert half.weight.dtype == half.bias.dtype == torch.bfloat16 and short.to(torch.float32).weight is short.weight
