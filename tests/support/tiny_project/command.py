from d2scale.commands.common import add_command, add_recipe, emit


def add_parser(commands):
    text = "show the channels of a tiny recipe"
    parser = add_command(commands, "tiny", text, run, takes_opts=True)
    add_recipe(parser)


def run(arguments):
    from d2scale.config import load_cfg

    cfg = load_cfg(arguments.config, arguments.opts)
    emit(f"{cfg.MODEL.TINY.CHANNELS}\n")
    return 0
