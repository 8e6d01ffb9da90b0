"""Text files and saved teachers for distillation on plain text."""

import tiny


def text_file(folder, lines=240):
    words = tiny.TEXT.split()
    text = [
        " ".join(words[(7 * i + j * j) % len(words)] for j in range(4 + i % 6)) + f" {i % 10}" for i in range(lines)
    ]
    path = folder / "text.txt"
    path.write_text("\n".join(dict.fromkeys(f"{line} {i}" for i, line in enumerate(text))))
    return path


def saved_teacher(dense_class, folder, **changes):
    model = tiny.teacher(dense_class, **changes)
    folder.mkdir()
    tiny.tokenizer_for(tiny.model_type(dense_class), folder).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
