"""A few hand-written exchanges, so that a greeting does not get a page of manual as its answer.

The answers say only what is true of the demonstration checkpoint: it is small, continues English text and
finds facts in a given text.
"""

from __future__ import annotations

GREETINGS: tuple[str, ...] = tuple(
    """Hello|Hello!|hello|Hi|hi|Hi!|Hey|hey there|Hi there|Hello there!|Good morning|Good morning!|Good evening
    |Good afternoon|Greetings|How are you?|Hello, how are you?|Hi, how are you doing?|Nice to meet you.|Test|test
    |Are you there?|Is anybody there?|Can you hear me?""".replace("\n", "").split("|")
)
GREETING_REPLIES: tuple[str, ...] = (
    "Hello! Give me a text and ask me about a fact in it.",
    "Hello! I can find facts in a long text. What would you like to ask?",
    "Hello! How can I help you?",
)
IDENTITY_QUESTIONS: tuple[str, ...] = tuple(
    """What are you?|Who are you?|who are you|what are you|What is your name?|Tell me about yourself.|Are you a
     person?|Are you human?|What model are you?|Which model is this?|Introduce yourself.|Are you a large language
     model?|Who made you?|What is this?|How were you trained?|What were you trained on?""".replace(
        "\n", ""
    )
    .replace("     ", " ")
    .split("|")
)
IDENTITY_REPLIES: tuple[str, ...] = (
    "I am a very small demonstration model. I was trained on free manuals and a few old novels.",
    "I am a small demonstration language model, trained on free English documentation.",
)
ABILITY_QUESTIONS: tuple[str, ...] = tuple(
    """What can you do?|what can you do|How can you help me?|Can you help me?|Help|help|What do you know?|What
     should I ask you?|What are you good at?|How do I use you?|What is your purpose?|What can I ask?|Can you
     answer questions?|Can you read long texts?""".replace("\n", "")
    .replace("     ", " ")
    .split("|")
)
ABILITY_REPLIES: tuple[str, ...] = (
    "I can find a fact in a long text that you give me, and I can continue a text.",
    "Give me a long text with a fact in it, such as a passkey, and ask me for it. I can also continue a text.",
)
LIMIT_QUESTIONS: tuple[str, ...] = tuple(
    """What is two plus two?|What is the capital of France?|Who is the president?|Write a poem.|Tell me a joke.|What
     is the weather today?|What time is it?|Can you write code?|Translate this into German.|What is the meaning of
     life?|Solve this equation.|Tell me the news.|Can you do my homework?|How do I cook rice?|Recommend a
     film.""".replace("\n", "")
    .replace("     ", " ")
    .split("|")
)
LIMIT_REPLIES: tuple[str, ...] = (
    "I am too small to know that. I can find facts in a text that you give me.",
    "I cannot do that: I am a small demonstration model. Give me a text and ask me about a fact in it.",
)
THANKS: tuple[str, ...] = [
    "Thanks",
    "Thank you",
    "Thank you!",
    "Thanks!",
    "thanks a lot",
    "Great, thank you.",
    "Well done.",
    "That is right.",
    "Correct!",
    "Good.",
]  # type: ignore[assignment]
THANKS_REPLIES: tuple[str, ...] = (
    "You are welcome!",
    "You are welcome! Ask me anything else about the text.",
)
FAREWELLS: tuple[str, ...] = (
    "Bye",
    "bye",
    "Goodbye",
    "Goodbye!",
    "See you later.",
    "Good night",
    "That is all.",
)
FAREWELL_REPLIES: tuple[str, ...] = ("Goodbye!",)

OPENINGS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (GREETINGS, GREETING_REPLIES),
    (IDENTITY_QUESTIONS, IDENTITY_REPLIES),
    (ABILITY_QUESTIONS, ABILITY_REPLIES),
    (LIMIT_QUESTIONS, LIMIT_REPLIES),
)
CLOSINGS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (THANKS, THANKS_REPLIES),
    (FAREWELLS, FAREWELL_REPLIES),
)

MEMORY_REPLIES: tuple[str, ...] = (
    "I will remember that.",
    "Thank you, I will remember it.",
    "Noted.",
)
CONTINUE_REQUESTS: tuple[str, ...] = (
    "Continue this text:",
    "Please continue the following text:",
    "How does this text go on?",
    "Write what comes next:",
)
