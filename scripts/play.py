"""Talk to the models of a run folder in the browser: base, SFT and PPO answer side by side (extra `ui`).

The page is served on 127.0.0.1 alone and asks nothing of any other machine; GRADIO_SERVER_PORT chooses the port. A crisis
gate, in code, stands before the models. The client's emotion is shown and can be changed; beside each reply stand the
reward terms that need no therapist's reply, and its log-probs token by token. It is a research demo, not care.
"""

from therapy_jax import run
from therapy_jax.config import Config


def main(config: Config) -> None:
    from therapy_jax import browser  # here, so that --help need not wait for jax

    browser.serve(config)


if __name__ == "__main__":
    run.main(main, __doc__)
