"""NaN, infinity and memory that runs out while images are drawn: who, where, and what to change."""

import pickle

import pytest
import torch

from dsco_hf.generators.failures import FiniteWatch, NonFiniteError, explained_out_of_memory, is_out_of_memory
from dsco_hf.matching.features import classification_head
from dsco_hf.sampling.flat import from_flat


OPTIONS = {"num_inference_steps": 6, "guidance_scale": 1.0, "output_type": "pt", "step_size": 0.1}
LABELS = [0, 0, 1, 2, 2, 2]


def draw(pipe, make, targets=None, **options):
    return pipe(LABELS, targets, generator=make.generators(range(10, 16)), **from_flat(OPTIONS | options))


@pytest.mark.parametrize("optimised", [False, True])
def test_a_denoiser_that_fails_is_found_at_once(pipe, targets, make, optimised):
    next(pipe.transformer.parameters()).data.fill_(float("nan"))
    match = r"The denoiser's output at step 0 \(t = 830\) is not finite for 6 of 6 images, of class\(es\) \[0, 1, 2\]"
    with pytest.raises(NonFiniteError, match=match) as caught:
        draw(pipe, make, targets if optimised else None)
    assert (caught.value.step, caught.value.class_labels) == (0, [0, 1, 2])
    assert isinstance(caught.value, FloatingPointError)


def test_step_and_class_are_named(pipe, make):
    """A denoiser whose answer to class 1 overflows below t = 500."""

    def overflow(_, args, kwargs, output):
        bad = (kwargs["class_labels"] == 1) & (kwargs["timestep"] < 500)
        output.sample[bad] = float("inf")
        return output

    pipe.transformer.register_forward_hook(overflow, with_kwargs=True)
    match = r"at step 2 \(t = 498\) is not finite for 1 of 6 images, of class\(es\) \[1\]"
    with pytest.raises(NonFiniteError, match=match) as error:
        draw(pipe, make)
    assert (error.value.step, error.value.class_labels) == (2, [1])


@pytest.mark.parametrize(("batch_size", "classes"), [(None, [2]), (4, [2])])
def test_a_classifier_that_fails(pipe, targets, make, batch_size, classes):
    """Features that overflow for the fourth image: its class has no loss, and is named."""

    def overflow(_, args):
        features = args[0].clone()
        features[3:4] = float("nan")
        return (features,)

    targets.check_pipeline(pipe)
    classification_head(pipe.classifier).register_forward_pre_hook(overflow)
    match = r"The objective or its gradient at step 3 \(t = 332\) is not finite.*decoder and classifier"
    with pytest.raises(NonFiniteError, match=match) as error:
        draw(pipe, make, targets, batch_size=batch_size)
    assert (error.value.step, error.value.class_labels) == (3, classes)


def test_images_that_are_not_finite(latent_pipe, make):
    latent_pipe.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"The decoded image is not finite for 6 of 6 images.*the VAE") as error:
        draw(latent_pipe, make)
    assert error.value.step is None and error.value.class_labels == [0, 1, 2]
    assert draw(latent_pipe, make, output_type="latent").images.isfinite().all()


def test_the_watch_keeps_the_first_step_of_each_image():
    watch = FiniteWatch([5, 7, 7], torch.tensor([900, 600, 300]))
    watch.see(0, torch.zeros(3, 2))
    watch.check()
    # what a GPU does: nothing is asked for until the end
    watch.first = torch.tensor([-1, 2, 1])
    with pytest.raises(NonFiniteError, match=r"step 1 \(t = 600\) is not finite for 1 of 3 images") as error:
        watch.check()
    assert (error.value.step, error.value.class_labels) == (1, [7])


def test_the_error_survives_another_process():
    error = pickle.loads(pickle.dumps(NonFiniteError("broken", step=3, class_labels=[4, 2, 4])))
    assert (str(error), error.step, error.class_labels) == ("broken", 3, [2, 4])


def allocate(*_):
    torch.empty(1 << 50)  # a petabyte: the allocator's own error


def test_out_of_memory_says_what_to_lower(latent_pipe, make):
    handle = latent_pipe.vae.decoder.register_forward_pre_hook(allocate)
    with pytest.raises(RuntimeError, match="can't allocate memory") as error:
        draw(latent_pipe, make, batch_size=4)
    (note,) = error.value.__notes__
    for setting in (
        "lower `batch_size` (images per pass through a model, now 4: `method=Sampling(batch_size=...)`)",
        *("(now 6; `images_per_call`", "`preview_vae`", "`pipe.vae.enable_slicing()`", "bfloat16"),
    ):
        assert setting in note
    handle.remove()
    assert draw(latent_pipe, make, batch_size=4).images.isfinite().all()  # the pipeline is as good as before


def test_advice_fits_the_pipeline(pipe):
    pipe.transformer.register_forward_pre_hook(allocate)
    with pytest.raises(RuntimeError) as error:
        pipe([0], num_inference_steps=1)
    (note,) = error.value.__notes__
    assert "batch_size" not in note and "vae" not in note and "bfloat16" in note


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not fit")) and not is_out_of_memory(ValueError("memory"))
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("shapes do not fit")):
        with pytest.raises(type(error)) as caught, explained_out_of_memory(8, 8, latent=False, preview=False):
            raise error
        assert hasattr(caught.value, "__notes__") == isinstance(error, torch.OutOfMemoryError)
