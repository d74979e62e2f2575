"""Talk to a model of a run folder in the terminal.

What you type first meets a crisis gate, in code; then the last trained model answers (ppo, else sft, else base), with the
conversation before it in mind. The client's emotion, a part of what the model is told, is read by the run's own classifier
(prompt.emotion: given) or written by the model (inferred), shown, and yours to correct. Replies are decoded as in the
evaluation (evaluate.temperature, top_k, top_p), checked, and shown a sentence at a time. Nothing is kept unless you say
/save; /help lists the commands. It is a research demo, not care.
"""

from therapy_jax import run
from therapy_jax.config import Config


def main(config: Config) -> None:
    from therapy_jax import terminal  # here, so that --help need not wait for jax

    terminal.chat(config)


if __name__ == "__main__":
    run.main(main, __doc__)
