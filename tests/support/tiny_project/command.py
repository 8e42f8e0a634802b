from d2scale.commands.common import add_command, emit


def add_parser(commands):
    parser = add_command(
        commands, "tiny", "show the channels of a tiny recipe", "", takes_opts=True
    )
    parser.add_argument("config")
    parser.set_defaults(command=run)


def run(arguments):
    from d2scale.config import load_cfg

    cfg = load_cfg(arguments.config, arguments.opts)
    emit(f"{cfg.MODEL.TINY.CHANNELS}\n", None)
    return 0
