import pytest
import torch

from securetune.models.attention import use_float32_attention
from tests.tiny import tiny_llama

IDS = torch.randint(2, 250, (3, 17), generator=torch.Generator().manual_seed(0))


def hidden(model, **inputs):
    with torch.no_grad():
        return model.get_decoder()(input_ids=IDS, use_cache=False, **inputs).last_hidden_state.double()


def test_float32_attention_is_no_less_exact_and_keeps_the_dtype():
    truth = hidden(tiny_llama(dtype=torch.float64))
    model = tiny_llama(dtype=torch.bfloat16)
    plain = (hidden(model) - truth).abs().mean()
    use_float32_attention(model)
    assert model.config._attn_implementation == "securetune_cpu"
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16
    assert (hidden(model) - truth).abs().mean() <= 1.1 * plain


def test_autocast_does_not_round_the_attention():
    model = tiny_llama()
    use_float32_attention(model)
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def noting(*args, **options):
        output = original(*args, **options)
        seen.append(output.dtype)
        return output

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
        hidden(model)
    assert seen == [torch.float32] * 2


def test_masks_are_still_applied():
    model = tiny_llama()
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    expected, unmasked = hidden(model, attention_mask=mask), hidden(model)
    use_float32_attention(model)
    torch.testing.assert_close(hidden(model, attention_mask=mask), expected)
    assert not torch.allclose(hidden(model, attention_mask=mask)[1, 5:], unmasked[1, 5:])


@pytest.mark.parametrize("implementation", ["eager"])
def test_another_attention_is_left_as_it_is(implementation):
    model = tiny_llama()
    model.set_attn_implementation(implementation)
    use_float32_attention(model)
    assert model.config._attn_implementation == implementation
