"""python -m gradexp.saliency IMAGE --model teacher --method fullgrad: draws a saliency map of any picture as a PNG."""

from gradexp.commands.explain import main

if __name__ == "__main__":
    main()
