"""Where the built-in rewards and the client of a served one are found. Each module loads when it is used."""

BUILTIN_REWARDS: dict[str, str] = {
    "geneval": "rewards.geneval.rewards:GenEval",
    "geneval_strict": "rewards.geneval.rewards:GenEvalStrict",
    "geneval_official": "rewards.geneval.rewards:GenEvalOfficial",
    "judge": "rewards.judge.judge:Judge",
    "editreward": "rewards.editreward.client:EditReward",
    "geneval_shapes": "worlds.shapes.scoring.rewards:GenEvalShapes",
    "edit_shapes": "worlds.shapes.scoring.rewards:EditShapes",
    "geneval_shapes_template": "worlds.shapes.scoring.template:TemplateGenEval",
    "edit_shapes_template": "worlds.shapes.scoring.template:TemplateEdit",
}

SERVED_REWARD = "rewards.service.client:ServedReward"
