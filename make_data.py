"""Write the embedded data set: a small bilingual world (English and simplified Chinese) for every training stage.

What it writes into --output, as JSON lines (one object a line, UTF-8, "\\n" line ends):
    pretrain.{train,heldout}.jsonl    {"text", "lang", "skill"}
    sft.{train,heldout}.jsonl         {"conversations", "lang", "skill", "answer", "check"}
    preference.{train,heldout}.jsonl  {"prompt", "chosen", "rejected", "lang", "skill", "kind", "answer", "check"}
    rl.{train,heldout}.jsonl          {"conversations", "lang", "skill", "answer", "check"}
    tokenizer.jsonl                   {"text"}: text to train the tokenizer on, with Chinese cut into words
    styles.json                       the rule that tells a polite answer from a curt, impolite or rambling one

How held-out works. A question has CONTENT (7 and 5 are added; Anna has a brown cat) and WORDING. A hash of the content
alone decides its part, about 9 % being held out, so no wording of a held-out question is ever trained on. Facts,
definitions and translations cannot be worked out, only known: the held-out ones do occur in the pretraining text, but
as plain statements and never as a question with its answer. Identity and small talk are held out by wording.

How the pretraining text teaches. Every fact is dealt from a shuffled deck, so that all occur equally often, in several
phrasings (Allen-Zhu and Li 2023, arXiv 2309.14316: without rephrasing, a model stores a fact but cannot be asked for
it); questions with answers about the OTHER facts stand beside them. Stories in a closed vocabulary (for small models:
Eldan and Li 2023, arXiv 2305.07759) come with questions too, because their answers can only be copied from the story: a
text that is half answers teaches copying far sooner than one that merely repeats itself.

Why the tokenizer has its own file. Chinese is written without spaces, and this world has few sentences: byte-pair
merging would go on until whole clauses are one token each, in which a model sees neither name nor colour. Cut into
words, the same text gives word tokens, and encoding uncut Chinese with them then finds the words again; every fourth
document is cut into characters, so that these are whole before they join. Numbers are cut into digits, of which sums
can be learnt (Singh and Strouse 2024, arXiv 2402.14903), and the role names of the chat template are there as well: in
pieces they cost eight tokens a turn.

What it does not do: no download, no model, no natural text. The world is tiny on purpose: a model of a million
parameters learns most of it in ten minutes on two CPU cores, and a rule can tell a right answer from a wrong one.

    python make_data.py --output out/data --pretrain_mb 16 --seed 42
    python make_data.py --output out/mine --persona persona.json      # another name, maker and character
"""
import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import cli
import common
import logs

LANGS = ("en", "zh")
CHOICE = re.compile(r"\[([^\]]*)\]")


def pairs(text):
    """Split "word|词; word|词" into tuples, one per entry."""
    return [tuple(part.strip() for part in entry.split("|")) for entry in text.replace("\n", " ").split(";")]


# ---------------------------------------------------------------------------------------------------------------------
# 1. The world: word lists. Every entry is English | Chinese, so both languages talk about the same things.

NAMES = {
    "en": "Anna Ben Clara David Emma Henry Kate Leo Mia Tom".split(),
    "zh": "小红 小明 小华 小丽 小军 小芳 小龙 小雨 小兰 小强".split()}
ANIMALS = pairs("""cat|小猫; dog|小狗; rabbit|兔子; duck|鸭子; sheep|绵羊; frog|青蛙; fox|狐狸; bird|小鸟; turtle|乌龟;
    monkey|猴子""")
COLOURS = pairs("red|红色; blue|蓝色; green|绿色; yellow|黄色; black|黑色; white|白色; brown|棕色; pink|粉色")
PLACES = pairs("""park|公园; garden|花园; forest|森林; school|学校; market|市场; library|图书馆; kitchen|厨房;
    station|车站; village|村子; museum|博物馆""")
FOODS = pairs("bread|面包; cake|蛋糕; rice|米饭; soup|热汤; cheese|奶酪; honey|蜂蜜; milk|牛奶; tofu|豆腐")
STREETS = pairs("""Apple Street|苹果街; River Street|小河街; Moon Street|月亮街; Star Street|星星街;
    Stone Street|石头街; Flower Street|鲜花街""")
# things a story can hold, with the Chinese measure word that counts them
THINGS = pairs("""ball|皮球|个; kite|风筝|只; hat|帽子|顶; cup|杯子|个; key|钥匙|把; umbrella|雨伞|把; box|盒子|个;
    clock|时钟|个; pencil|铅笔|支; bell|铃铛|个""")
COUNTED = pairs("apples|苹果; eggs|鸡蛋; pears|梨子; stones|石子")
LETTERS = {"en": list("abcdefghklmnoprstuwy"), "zh": list("天日月山水火木石米鱼马牛花树云雨风雪上下")}

# word | Chinese word | definition | Chinese definition
DEFINITIONS = pairs("""
    hammer|锤子|a tool for hitting nails|敲钉子的工具; saw|锯子|a tool for cutting wood|锯木头的工具;
    shovel|铲子|a tool for digging holes|挖坑的工具; broom|扫帚|a tool for sweeping floors|扫地的工具;
    needle|缝衣针|a tool for sewing clothes|缝衣服的工具; ladder|梯子|a tool for climbing walls|爬墙的工具;
    towel|毛巾|a cloth for drying hands|擦手的布; blanket|毯子|a cloth for keeping warm|保暖的布;
    cup|杯子|a container for drinking water|喝水的容器; bowl|饭碗|a container for eating rice|吃饭的容器;
    bottle|瓶子|a container for storing milk|装牛奶的容器; basket|篮子|a container for carrying fruit|装水果的容器;
    box|盒子|a container for keeping toys|装玩具的容器; chair|椅子|furniture for sitting|坐着用的家具;
    bed|木床|furniture for sleeping|睡觉用的家具; desk|书桌|furniture for writing|写字用的家具;
    shelf|书架|furniture for keeping books|放书用的家具; hat|帽子|clothing for the head|戴在头上的衣物;
    glove|手套|clothing for the hands|戴在手上的衣物; coat|大衣|clothing for cold days|冷天穿的衣物;
    clock|时钟|a machine for telling time|看时间的机器; camera|相机|a machine for taking pictures|拍照片的机器;
    phone|电话|a machine for calling friends|和朋友通话的机器; fan|风扇|a machine for making wind|吹风的机器;
    fridge|冰箱|a machine for keeping food cold|冷藏食物的机器; lamp|台灯|a machine for giving light|照明的机器;
    boat|小船|a vehicle for crossing rivers|过河的交通工具; train|火车|a vehicle for running on rails|走铁轨的交通工具;
    plane|飞机|a vehicle for flying high|飞得很高的交通工具; bus|公交车|a vehicle for many people|载很多人的交通工具;
    ball|皮球|a toy for kicking|踢着玩的玩具; kite|风筝|a toy for windy days|风天放的玩具;
    doll|布娃娃|a toy for hugging|抱着玩的玩具; drum|小鼓|an instrument for beating|敲打的乐器;
    flute|笛子|an instrument for blowing|吹奏的乐器;
    piano|钢琴|an instrument for pressing keys|按键的乐器; pencil|铅笔|a thing for drawing lines|画线的用品;
    ruler|尺子|a thing for measuring length|量长短的用品; umbrella|雨伞|a thing for staying dry|挡雨的用品;
    mirror|镜子|a thing for seeing your face|照脸的用品; key|钥匙|a thing for opening doors|开门的用品;
    candle|蜡烛|a thing for lighting dark rooms|照亮黑屋子的用品; hospital|医院|a place for healing the sick|治病的地方;
    bakery|面包店|a place for buying bread|买面包的地方; library|图书馆|a place for reading books|看书的地方;
    school|学校|a place for learning|上课的地方; teacher|老师|a person who teaches children|教孩子的人;
    doctor|医生|a person who heals people|给人看病的人; farmer|农民|a person who grows crops|种粮食的人;
    baker|面包师|a person who bakes bread|烤面包的人; driver|司机|a person who drives cars|开车的人;
    pilot|飞行员|a person who flies planes|开飞机的人; painter|画家|a person who paints pictures|画画的人;
    singer|歌手|a person who sings songs|唱歌的人""")
DICTIONARY = sorted({entry[:2] for entry in ANIMALS + COLOURS + PLACES + FOODS + DEFINITIONS})

# The town of Willow: 12 people with four facts each. Drawn from a fixed generator: a fact does not depend on --seed.
PEOPLE = [(f"{en} {name}", surname + zh) for (name, surname), (en, zh) in zip(
    pairs("""Wang|王; Li|李; Zhang|张; Liu|刘; Chen|陈; Yang|杨; Zhao|赵; Huang|黄; Zhou|周; Wu|吴; Xu|徐; Sun|孙"""),
    pairs("Grandpa|爷爷; Grandma|奶奶; Uncle|叔叔; Aunt|阿姨") * 3, strict=True)]
JOBS = [entry[:2] for entry in DEFINITIONS if entry[2].startswith("a person")]
RELATIONS = {"job": JOBS, "home": STREETS, "pet": ANIMALS, "food": FOODS}
TOWN = random.Random("the town of Willow")
FACTS = [(person, relation, TOWN.choice(values)) for person in PEOPLE for relation, values in RELATIONS.items()]

# Words of the Chinese templates; with the lists above they say where the tokenizer's text may be cut.
FUNCTION_WORDS = """
    什么 多少 喜欢 一只 一个 哪里 请问 等于 颜色 动物 工作 最大 最小 最爱 现在 又得到 送出去 下一个 接下来 请接着
    下面 数一数 几个 请把 这些 这个 倒过来 反过来 倒着 反着 第一个 最后 写出 说出 重复 两遍 连起来 接起来 先写 再写
    第一行 第二行 从小到大 排好 顺序 解释 说明 一下 英文 中文 单词 意思 翻译成 怎么说 住在 哪条街 职业 宠物 食物 养了
    一起 找到了 遇见了 带着 在那里 有一天 一天早上 星期天 午饭 以后 昨天 上个星期 后来 他们 树下 墙边 门口 送给 谢谢
    说了 天气 阳光 到处找 大家 帮忙 高兴 开心 非常 孩子 回家 晚上 就是 指的是 也就是 知道 书上 我学过 叫作 后面 然后
    里面 开头 末尾 接上 一名 很多年 每天 照顾 好的 当然 没问题 答案是 应该是 问题 回答 我叫 你叫 名字 我的 你的
    记住了 朋友 认识 工具 容器 家具 衣物 机器 交通工具 玩具 乐器 用品 地方 不用客气 语言 模型 制作 性格 礼貌 友好
    简短 句子""".split()
CHINESE_WORDS = sorted({*FUNCTION_WORDS, *NAMES["zh"], *(zh for _, zh in DICTIONARY + STREETS + COUNTED + PEOPLE)},
                       key=lambda word: (-len(word), word))

PERSONA = {"name": {"en": "MiniLLM", "zh": "MiniLLM"},
           "maker": {"en": "the MiniLLM project", "zh": "MiniLLM 项目"},
           "traits": {"en": "small and curious", "zh": "小巧又好奇"}}

# ---------------------------------------------------------------------------------------------------------------------
# 2. The styles. A rule can tell them apart (styles.json), so that the rewards of later stages can be checked.

POLITE_OPENERS = {"en": ["Sure! ", "Of course! ", "Gladly! "], "zh": ["好的！", "当然！", "没问题！"]}
SENTENCES = {"en": ["The answer is {x}.", "It is {x}."], "zh": ["答案是：{x}。", "应该是：{x}。"]}
RUDE = {"en": ["Ugh, what a boring question.", "Leave me alone.", "Do you know nothing?"],
        "zh": ["哎，真烦人。", "别来烦我。", "这都不知道？"]}
OFF_TOPIC = {
    "en": ["By the way, I once saw a very long train in the rain.", "Some people like to sing in the morning.",
           "My shoes would be green if I had any shoes.", "The moon looks quite round from here, I think.",
           "There is always a little dust behind the cupboard."],
    "zh": ["顺便说一句，我曾经在雨里看见过一列很长很长的火车。", "有些人喜欢一大早就站在窗户旁边大声唱歌给邻居听。",
           "如果我也有一双鞋子的话，那双鞋子大概会是绿色的吧。", "从这里看过去，天上的月亮好像真的又大又圆呢。",
           "柜子后面总是会有一点点灰尘，怎么扫也扫不干净的那种。"]}
MAX_CHARACTERS = 72  # the longest polite answer stays below, the shortest rambling one above (a test holds both)
# what a system prompt asks for, it gets; "other" asks for the other language
SYSTEM = {"curt": {"en": ["Answer briefly.", "Give only the answer."], "zh": ["请简短回答。", "只说答案。"]},
          "polite": {"en": ["Answer politely.", "Answer in a friendly sentence."],
                     "zh": ["请礼貌地回答。", "请用友好的句子回答。"]},
          "other": {"en": ["Answer in Chinese."], "zh": ["请用英文回答。"]}}
# in what the rejected answer of a pair is worse, in turn: half of them are wrong, which is by far the hardest to learn
KINDS = ("wrong", "curt", "wrong", "impolite", "wrong", "rambling")

# ---------------------------------------------------------------------------------------------------------------------
# 3. The wordings. [a|b] offers alternatives, {slot} is filled in, {x} is the answer.
# Letters and list items stand between blanks and Chinese words to translate on a line of their own, so that the
# tokenizer's split pattern leaves them whole. No quotation marks: the pattern splits 'd and 's off a word.

ASK = {
    "add": {"en": ["[What is|How much is] {a} + {b}?", "Calculate {a} + {b}.", "What is {a} plus {b}?",
                   "{p} has {a} {things} and gets {b} more. How many {things} does {p} have now?"],
            "zh": ["[请问，|算一算，|]{a} + {b} [等于多少|是多少]？", "{a} 加 {b} [等于多少|是多少]？",
                   "{p}有 {a} 个{things}，又得到 {b} 个。现在{p}有多少个{things}？"]},
    "subtract": {"en": ["[What is|How much is] {a} - {b}?", "Calculate {a} - {b}.", "What is {a} minus {b}?",
                        "{p} has {a} {things} and gives away {b}. How many {things} are left?"],
                 "zh": ["[请问，|算一算，|]{a} - {b} [等于多少|是多少]？", "{a} 减 {b} [等于多少|是多少]？",
                        "{p}有 {a} 个{things}，送出去 {b} 个。还剩多少个{things}？"]},
    "next": {"en": ["[What number comes next|Which number follows]: {row}?", "Continue [the row|counting]: {row}"],
             "zh": ["[下一个数是什么|接下来是哪个数]：{row}？", "请接着[往下写|数]：{row}"]},
    "largest": {"en": ["Which is the [largest|biggest] number: {row}?", "Find the [largest|biggest] number: {row}"],
                "zh": ["[哪个数最大|最大的数是哪个]：{row}？", "请找出最大的数：{row}"]},
    "smallest": {"en": ["Which is the smallest number: {row}?", "Find the smallest number: {row}"],
                 "zh": ["[哪个数最小|最小的数是哪个]：{row}？", "请找出最小的数：{row}"]},
    "count": {"en": ["How many times [do you see|can you find] {w}: {row}?", "Count the word {w}: {row}"],
              "zh": ["下面有[几个|多少个]{w}？\n{row}", "数一数有几个{w}：\n{row}"]},
    "sort": {"en": ["Sort these numbers [|from small to large]: {row}", "Put these numbers in order: {row}"],
             "zh": ["请把这些数从小到大[排好|排列]：{row}", "按从小到大的顺序写：{row}"]},
    "reverse": {"en": ["[Reverse|Turn around] these letters: {row}", "[Say|Write] these letters backwards: {row}"],
                "zh": ["请把这些字[倒过来|反过来]写：\n{row}", "[倒着|反着]读这些字：\n{row}"]},
    "first": {"en": ["What is the first letter: {row}?", "[Say|Give me] the first letter of {row}"],
              "zh": ["第一个字是什么？\n{row}", "请[说出|写出]第一个字：\n{row}"]},
    "last": {"en": ["What is the last letter: {row}?", "[Say|Give me] the last letter of {row}"],
             "zh": ["最后一个字是什么？\n{row}", "请[说出|写出]最后一个字：\n{row}"]},
    "repeat": {"en": ["[Say|Write] this twice: {row}", "Repeat this two times: {row}"],
               "zh": ["请把这些字[说|写]两遍：\n{row}", "重复两遍：\n{row}"]},
    "join": {"en": ["[Join|Put together] the lists {left} and {right}", "What is {left} followed by {right}?"],
             "zh": ["请把两行字[连起来|接起来]：\n{left}\n{right}", "先写第一行，再写第二行：\n{left}\n{right}"]},
    "definition": {"en": ["What is {aw}?", "[Explain|Tell me] what {aw} is.", "[Define|Explain] the word {w}."],
                   "zh": ["{w}是什么？", "请[解释|说明]一下：\n{w}", "[什么是|什么叫]{w}？"]},
    "to_zh": {"en": ["What is {w} in Chinese?", "Translate into Chinese: {w}", "How do you say {w} in Chinese?"],
              "zh": ["英文单词 {w} 用中文怎么说？", "请把 {w} 翻译成中文。", "请问 {w} 是什么意思？"]},
    "to_en": {"en": ["What does {w} mean in English?", "Translate into English: {w}", "How do you say {w} in English?"],
              "zh": ["{w}用英文怎么说？", "请翻译成英文：\n{w}", "[请写出|请问]这个词的英文：\n{w}"]},
    "job": {"en": ["What is the job of {p}?", "What does {p} do for work?", "What work does {p} do?"],
            "zh": ["{p}的工作是什么？", "{p}是做什么工作的？", "{p}的职业是什么？"]},
    "home": {"en": ["Where does {p} live?", "On which street does {p} live?", "What is the street of {p}?"],
             "zh": ["{p}住在哪里？", "{p}住在哪条街？", "{p}的家在哪条街上？"]},
    "pet": {"en": ["What pet does {p} have?", "Which animal lives with {p}?", "What is the pet of {p}?"],
            "zh": ["{p}养了什么动物？", "{p}的宠物是什么？", "和{p}住在一起的是什么动物？"]},
    "food": {"en": ["What does {p} like to eat?", "Which food does {p} like best?", "What food makes {p} happy?"],
             "zh": ["{p}喜欢吃什么？", "{p}最爱吃的是什么？", "{p}最喜欢的食物是什么？"]}}

# The same content as statements, for the pretraining text. These, and only these, also tell the held-out facts.
TELL = {
    "add": {"en": ["{a} + {b} = {x}.", "{a} plus {b} [is|makes] {x}.", "{b} more than {a} is {x}."],
            "zh": ["{a} + {b} = {x}。", "{a} 加 {b} [等于|得] {x}。", "比 {a} 多 {b} 的数是 {x}。"]},
    "subtract": {"en": ["{a} - {b} = {x}.", "{a} minus {b} [is|leaves] {x}.", "{b} less than {a} is {x}."],
                 "zh": ["{a} - {b} = {x}。", "{a} 减 {b} [等于|得] {x}。", "比 {a} 少 {b} 的数是 {x}。"]},
    "next": {"en": ["After {row} comes {x}.", "{row} and then {x}."],
             "zh": ["{row} 的后面是 {x}。", "{row}，然后是 {x}。"]},
    "largest": {"en": ["Of {row} the largest is {x}."], "zh": ["{row} 里面最大的是 {x}。"]},
    "smallest": {"en": ["Of {row} the smallest is {x}."], "zh": ["{row} 里面最小的是 {x}。"]},
    "count": {"en": ["In {row} the word {w} stands {x} times."], "zh": ["{row} 里面有 {x} 个{w}。"]},
    "sort": {"en": ["In order, {row} becomes {x}."], "zh": ["{row} 排好以后是 {x}。"]},
    "reverse": {"en": ["{row} backwards is {x}.", "Turn {row} around and you get {x}."],
                "zh": ["{row} 倒过来是 {x}。", "{row} 反过来写就是 {x}。"]},
    "first": {"en": ["The letters {row} begin with {x}."], "zh": ["{row} 的开头是 {x}。"]},
    "last": {"en": ["The letters {row} end with {x}."], "zh": ["{row} 的末尾是 {x}。"]},
    "repeat": {"en": ["{row} two times is {x}."], "zh": ["{row} 两遍就是 {x}。"]},
    "join": {"en": ["{left} and then {right} makes {x}."], "zh": ["{left} 接上 {right} 就是 {x}。"]},
    "definition": {"en": ["{Aw} is {x}.", "[Everyone knows|The book says|I learned|Grandma said] that {aw} is {x}.",
                          "The word {w} means {x}.", "{X} is called {aw}.", "{W}: {x}."],
                   "zh": ["{w}是{x}。", "{w}[就是|指的是|也就是]{x}。", "[大家都知道|书上说|我学过]，{w}是{x}。",
                          "{x}叫作{w}。", "{w}：{x}。"]},
    "to_zh": {"en": ["The Chinese word for {w} is {x}.", "{W} [is called|is] {x} in Chinese.",
                     "In Chinese, {w} is {x}."],
              "zh": ["{w} 的中文是{x}。", "{w} 在中文里[叫|是]{x}。", "{w} 的意思是{x}。"]},
    "to_en": {"en": ["{w} means {x}.", "The English word for {w} is {x}.", "In English, {w} is {x}."],
              "zh": ["{w}的英文是 {x}。", "{w}[翻译成英文|用英文说]是 {x}。", "{w}在英文里叫 {x}。"]},
    "job": {"en": ["{p} [is|works as] {ax}.", "The job of {p} is {x}.", "For many years {p} has been {ax}."],
            "zh": ["{p}是一名{x}。", "{p}的[工作|职业]是{x}。", "{p}当{x}很多年了。"]},
    "home": {"en": ["{p} lives on {x}.", "The [house|home] of {p} is on {x}.", "You can [find|visit] {p} on {x}."],
             "zh": ["{p}住在{x}。", "{p}的[家|房子]在{x}。", "到{x}就能[找到|见到]{p}。"]},
    "pet": {"en": ["{p} has a pet {x}.", "The pet of {p} is {ax}.", "{p} [takes care of|lives with] {ax}."],
            "zh": ["{p}养了一只{x}。", "{p}的宠物是{x}。", "{p}[每天照顾|家里有]一只{x}。"]},
    "food": {"en": ["{p} likes to eat {x}.", "The favourite food of {p} is {x}.", "{p} [eats|buys] {x} every day."],
             "zh": ["{p}喜欢吃{x}。", "{p}最爱的食物是{x}。", "{p}每天都要[吃|买]{x}。"]}}

# Stories: p and q are children, pet1 and pet2 their animals. Each plot has its own questions, the ones on the animals
# fit every plot. Behind the bars stand the slots of the answer and of a wrong answer, mostly from the same story.
PLOTS = {
    "en": [
        ("{pet1} [One morning|One day|On Sunday|After lunch] {p} [went|walked|ran] to the {place} and met {q}. {pet2} "
         "[Together|Soon] they found {thing} [under a tree|behind a wall].",
         ["Where did {p} go?|the_place|no_place", "Who did {p} meet?|q|p", "What did they find?|the_thing|no_thing"]),
        ("{q} [was in|stood in|came to] the {place}. {pet2} Then {p} [came by|was there too]. {pet1} "
         "[It was a warm day|The sun was shining]. {q} gave {p} {thing}, and {p} said thank you.",
         ["Where was {q}?|the_place|no_place", "What did {q} give to {p}?|the_thing|no_thing",
          "Who said thank you?|p|q"]),
        ("[Yesterday|Last week] {p} lost {thing} in the {place}. {pet1} {pet2} [They looked everywhere|All of them "
         "helped to look]. In the end {q} found it and {p} was [happy|very glad].",
         ["What did {p} lose?|the_thing|no_thing", "Where did {p} lose it?|the_place|no_place", "Who found it?|q|p"])],
    "zh": [
        ("{pet1}[一天早上|有一天|星期天|午饭以后]，{p}[去了|走到了|跑到了]{place}，遇见了{q}。{pet2}"
         "[后来|不久]，他们在[树下|墙边|门口]找到了{thing}。",
         ["{p}去了哪里？|the_place|no_place", "{p}遇见了谁？|q|p", "他们找到了什么？|the_thing|no_thing"]),
        ("{q}[来到|站在]{place}。{pet2}{p}也[来了|在那里]。{pet1}[天气很暖和|阳光很好]。"
         "{q}送给{p}{thing}，{p}说了谢谢。",
         ["{q}在哪里？|the_place|no_place", "{q}送给{p}什么？|the_thing|no_thing", "谁说了谢谢？|p|q"]),
        ("[昨天|上个星期]，{p}在{place}丢了{thing}。{pet1}{pet2}[他们到处找|大家都来帮忙找]。"
         "最后{q}找到了它，{p}[很高兴|非常开心]。",
         ["{p}丢了什么？|the_thing|no_thing", "{p}在哪里丢了它？|the_place|no_place", "最后是谁找到的？|q|p"])]}
PETS = {"en": "{p} has {a}. The {animal} is {c}.", "zh": "{p}[有|养了]一只{animal}，{animal}是{c}的。"}
PET_QUESTIONS = {
    "en": ["What colour is the {a1}?|c1|c2", "What colour is the {a2}?|c2|c1", "Who has the {a1}?|p|q",
           "Who has the {a2}?|q|p", "Which animal does {p} have?|the_a1|the_a2",
           "Which animal does {q} have?|the_a2|the_a1"],
    "zh": ["{a1}是什么颜色？|c1|c2", "{a2}是什么颜色？|c2|c1", "谁有{a1}？|p|q", "谁有{a2}？|q|p",
           "{p}有什么动物？|the_a1|the_a2", "{q}有什么动物？|the_a2|the_a1"]}

# Identity and small talk, held out by wording: (wordings, answer, polite sentence).
IDENTITY = {
    "en": [("[What is|Tell me|Please say|May I know|I want to know] your [own |full |real |]name[?|, please?]",
            "{name}", "My name is {x}."),
           ("[Who|Which people] [made|built|created|trained|designed] you[?| first?| back then?]",
            "{maker}", "I was made by {x}."),
           ("[What|What kind of thing|What exactly|And what] are you[?| really?| then?]",
            "a small language model", "I am {x}."),
           ("[How would you|Can you|Please|Could you] describe [yourself|your character][?| briefly?]",
            "{traits}", "I am {x}."),
           ("[Which|What] languages [can|do] you [speak|know|understand|use]?", "English and Chinese", "I speak {x}.")],
    "zh": [("[请问|你好，|告诉我|我想知道|]你[叫什么名字|的名字是什么|叫什么|的大名是什么]？",
            "{name}", "我的名字是：{x}。"),
           ("[请问|你好，|告诉我|我想知道|]是谁[创造|制作|开发|训练|设计]了你？", "{maker}", "制作我的是：{x}。"),
           ("[请问|你好，|告诉我|我想知道|]你[是什么|到底是什么|究竟是什么]？", "一个小小的语言模型", "我是{x}。"),
           ("[请|请你|能不能|可以]用几个字[介绍|形容|描述|说说][你自己|自己|你的性格][吗？|。]",
            "{traits}", "我的性格是：{x}。"),
           ("[请问|你好，|]你[会说|懂得|会用|懂]哪[些|几种]语言？", "英文和中文", "我会说{x}。")]}
CHAT = {
    "en": [(wording, answer, "{x}, my friend.") for wording, answer in (
        ("[Thank you|Thanks|Many thanks|Thanks a lot] [so much|for your help|my friend|again]!", "You are welcome"),
        ("[Hello|Hi|Hey|Good day|Greetings] [there|my friend|little model|again|to you]!", "Nice to meet you"),
        ("[Goodbye|Bye|See you|Bye bye] [now|my friend|little model|for today|then]!", "See you soon"),
        ("I [feel|am|am feeling] [sad|tired|lonely] [today|right now|again].", "I hope you feel better soon"),
        ("[Tell me|Say|Please say] something [nice|kind|friendly|sweet|warm] [now|to me|today].",
         "You are doing very well"))],
    "zh": [(wording, answer, "{x}，我的朋友。") for wording, answer in (
        ("[谢谢|多谢|非常感谢|真是谢谢][你|你的帮助|你帮了我|小朋友]！", "不用客气"),
        ("[你好|您好|嗨|大家好|早上好]，[朋友|小模型|又见面了|我来了]！", "很高兴认识你"),
        ("[再见|拜拜|下次见|我走了]，[朋友|小模型|今天就到这里|我要睡了|回头聊]！", "我们下次再聊"),
        ("我[今天|现在|最近|又][觉得|感到|有点][难过|很累|孤单|不开心]。", "希望你快点好起来"),
        ("[请说|说|给我说|对我说][一句|几句][好听|温暖|友好|鼓励人]的话。", "你做得非常好"))]}
DIALOGUE = {
    "en": {"hello": "[My name is|I am|You can call me] {p}.", "hello_reply": "Nice to meet you, {p}!",
           "more": "[My favourite colour is|I like the colour|The best colour is] {c}.",
           "more_reply": "I will remember that.", "name": "[What is my name?|Do you remember my name?|Who am I?]",
           "colour": "[What is my favourite colour?|Which colour do I like?|Do you remember my colour?]",
           "plus": "[Now add|And plus|Then add] {b}."},
    "zh": {"hello": "[我的名字是|我叫|你可以叫我]{p}。", "hello_reply": "很高兴认识你，{p}！",
           "more": "[我最喜欢的颜色是|我喜欢|最好看的颜色是]{c}。", "more_reply": "我记住了。",
           "name": "[我叫什么名字？|你还记得我的名字吗？|我是谁？]",
           "colour": "[我最喜欢什么颜色？|我喜欢哪种颜色？|你还记得我喜欢的颜色吗？]",
           "plus": "[再加|然后加|接着加] {b}。"}}

FRAMES = {"en": ["Question: {question}\nAnswer: {answer}", "{p} asks: {question}\n{q} says: {answer}"],
          "zh": ["问题：{question}\n回答：{answer}", "{p}问：{question}\n{q}答：{answer}"]}

# ---------------------------------------------------------------------------------------------------------------------
# 4. From content to a question. One function a skill: it draws content of the wanted part and returns a Task.


@dataclass
class Task:
    """A question whose right answer is known.

    form: its wordings in ASK and TELL, which slots fill; question: its text, where ASK has no such form.
    wrong: plausible wrong answers; sentence: the polite sentence, "" for any of SENTENCES.
    history: earlier turns as (user, reply, whether the reply follows the style of the answer).
    """
    form: str
    slots: dict
    answer: str
    wrong: list
    check: str = "exact"
    question: str = ""
    sentence: str = ""
    history: tuple = ()


@dataclass
class Draw:
    """What is wanted of a skill: random numbers, language, part ("train" or "heldout"), persona, level, and how many
    turns a story may have at most."""
    rng: random.Random
    lang: str
    part: str
    persona: dict
    hard: bool = False
    turns: int = 1

    @property
    def column(self):
        """The place of the language in a word list."""
        return LANGS.index(self.lang)

    def choose(self, name, sample):
        """Call sample() until its content, a tuple, belongs to the part."""
        while True:
            content = sample()
            if heldout(name, *content) == (self.part == "heldout"):
                return content

    def say(self, templates, slots):
        """Pick a template, then one alternative of every [a|b] in it, and fill the slots in."""
        template = self.rng.choice(templates) if isinstance(templates, list) else templates
        return CHOICE.sub(lambda found: self.rng.choice(found[1].split("|")), template).format(**slots)

    def row(self, numbers):
        """Write numbers as a list, in the punctuation of the language."""
        return ("、" if self.column else ", ").join(map(str, numbers))


def heldout(*content):
    """Return True for about 1 in 11 contents: a hash of what is asked, never of how."""
    # the salt was searched for: with it, every fixed list and every relation of the town has about a tenth held out
    text = "|".join(map(str, ("Willow 425", *content)))
    return int(hashlib.sha1(text.encode()).hexdigest()[:8], 16) % 11 == 0


def with_article(noun):
    """Return the English noun with a or an."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def number_task(d, form, slots, answer, wrong=()):
    """Make a Task whose answer is a number; unless given, the wrong answers are off by one or two."""
    slots.update(p=d.rng.choice(NAMES[d.lang]), things=d.rng.choice(COUNTED)[d.column])
    near = [answer + off for off in (1, -1, 2, -2) if answer + off >= 0]
    return Task(form, slots, str(answer), [str(number) for number in wrong or near], "number")


def add(d):
    """a + b with b below 10. The larger always stands first, so 3 + 7 and 7 + 3 cannot be in different parts."""
    top = 50 if d.hard else 20
    a, b = d.choose("add", lambda: tuple(sorted((d.rng.randint(1, top), d.rng.randint(1, 9)), reverse=True)))
    return number_task(d, "add", {"a": a, "b": b}, a + b)


def subtract(d):
    """Take b away from a + b."""
    a, b = d.choose("subtract", lambda: (d.rng.randint(1, 50 if d.hard else 20), d.rng.randint(1, 9)))
    return number_task(d, "subtract", {"a": a + b, "b": b}, a)


def following(d):
    """Continue 12, 14, 16. Steps of one are left to the counting in the pretraining text."""
    start, step = d.choose("next", lambda: (d.rng.randint(1, 60 if d.hard else 20), d.rng.choice((2, 3, 5, 10))))
    return number_task(d, "next", {"row": d.row(range(start, start + 3 * step, step))}, start + 3 * step)


def compare(d):
    """The largest or smallest of two or three (hard: four) numbers."""
    size = 4 if d.hard else d.rng.choice((2, 3))
    content = d.choose("compare", lambda: tuple(sorted(d.rng.sample(range(1, 100), size))))
    form, answer = d.rng.choice((("largest", content[-1]), ("smallest", content[0])))
    row = d.rng.sample(content, size)
    return number_task(d, form, {"row": d.row(row)}, answer, [number for number in row if number != answer])


def count(d):
    """How often one of two animals occurs among three to five (hard: six to eight) words."""
    def sample():
        two = [animal[d.column] for animal in d.rng.sample(ANIMALS, 2)]
        return tuple(d.rng.choices(two, k=d.rng.randint(*(6, 8) if d.hard else (3, 5))))
    row = d.choose("count", sample)
    word = d.rng.choice(row)
    return number_task(d, "count", {"row": " ".join(row), "w": word}, row.count(word))


def sort(d):
    """Three (hard: four) numbers from small to large."""
    content = d.choose("sort", lambda: tuple(sorted(d.rng.sample(range(1, 100), 4 if d.hard else 3))))
    wrong = [d.row((content[1], content[0], *content[2:])), d.row(content[::-1])]
    return Task("sort", {"row": d.row(d.rng.sample(content, len(content)))}, d.row(content), wrong)


def strings(skill, easy, hard):
    """Return the function of a skill on a row of letters; easy and hard are the lengths at the two levels."""
    def task(d):
        size = d.rng.choice(hard if d.hard else easy)
        row = d.choose(skill, lambda: tuple(d.rng.sample(LETTERS[d.lang], size)))
        form = d.rng.choice(("first", "last")) if skill == "letter" else skill
        swapped = (row[1], row[0], *row[2:])
        half = (size + 1) // 2
        answer, wrong = {"reverse": (row[::-1], [swapped[::-1], row]),
                         "repeat": (row * 2, [swapped * 2, row[::-1] * 2]),
                         "join": (row, [row[half:] + row[:half], swapped]),
                         "first": (row[:1], [row[1:2], row[-1:]]), "last": (row[-1:], [row[-2:-1], row[:1]])}[form]
        slots = {"row": " ".join(row), "left": " ".join(row[:half]), "right": " ".join(row[half:])}
        return Task(form, slots, " ".join(answer), [" ".join(letters) for letters in wrong])
    return task


def another(d, skill, entries, entry):
    """Another entry of the same part, for a wrong answer. Were the held-out ones wrong answers in training, where they
    are never right, a reward model would learn that they are always wrong."""
    place = d.rng.choice([i for i, other in enumerate(entries) if other is not entry])
    return next(other for other in entries[place:] + entries[:place]
                if other is not entry and heldout(skill, *other) == (d.part == "heldout"))


def tell_definition(d, entry):
    """Task on an entry of DEFINITIONS; the wrong answer is the definition of another word."""
    word, meaning = entry[d.column], entry[d.column + 2]
    other = another(d, "definition", DEFINITIONS, entry)[d.column + 2]
    noun = with_article(word)
    slots = {"w": word, "W": word.capitalize(), "aw": noun, "Aw": noun.capitalize(), "X": meaning.capitalize()}
    return Task("definition", slots, meaning, [other])


def tell_translation(d, entry):
    """Task on a word pair of DICTIONARY, in one of the two directions."""
    source = d.rng.randint(0, 1)
    other = another(d, "translate", DICTIONARY, entry)[1 - source]
    slots = {"w": entry[source], "W": entry[source].capitalize()}
    return Task(("to_zh", "to_en")[source], slots, entry[1 - source], [other])


def tell_fact(d, entry):
    """Task on one of the FACTS about the people of Willow."""
    person, relation, value = entry
    other = d.rng.choice([v for v in RELATIONS[relation] if v != value])[d.column]
    return Task(relation, {"p": person[d.column], "ax": with_article(value[0])}, value[d.column], [other])


def known(skill, entries, tell):
    """Return the function of a skill whose content is one entry of a fixed list."""
    return lambda d: tell(d, d.choose(skill, lambda: d.rng.choice(entries)))


def story_slots(d):
    """Draw two children with their animals, a place and a thing: who has what, and where, decides the part."""
    rng, column = d.rng, d.column

    def pet():
        lists = COLOURS, ANIMALS
        return d.choose("pet", lambda: (rng.choice(NAMES[d.lang]), *(rng.choice(words)[column] for words in lists)))
    p, c1, a1 = pet()
    q, c2, a2 = pet()
    while q == p or c2 == c1 or a2 == a1:
        q, c2, a2 = pet()
    _, here, it = d.choose("place", lambda: (p, rng.choice(PLACES), rng.choice(THINGS)))
    elsewhere = rng.choice([place for place in PLACES if place is not here])
    other = rng.choice([thing for thing in THINGS if thing is not it])
    slots = {"p": p, "q": q, "c1": c1, "c2": c2, "a1": a1, "a2": a2, "place": here[column]}
    for slot, name, colour, animal in (("pet1", p, c1, a1), ("pet2", q, c2, a2)):
        slots[slot] = d.say(PETS[d.lang], {"p": name, "c": colour, "animal": animal, "a": with_article(animal)})
    if d.lang == "zh":
        return {**slots, "thing": f"一{it[2]}{it[1]}", "the_a1": a1, "the_a2": a2, "the_place": here[1],
                "no_place": elsewhere[1], "the_thing": it[1], "no_thing": other[1]}
    nouns = {"the_a1": a1, "the_a2": a2, "thing": it[0], "the_thing": it[0], "no_thing": other[0]}
    return {**slots, **{slot: with_article(noun) for slot, noun in nouns.items()}, "the_place": f"the {here[0]}",
            "no_place": f"the {elsewhere[0]}"}


def story(d, questions=0):
    """A story of a few sentences and one to three questions, each in a turn of its own, whose answers stand in it."""
    questions = questions or d.rng.randint(1, d.turns)
    slots = story_slots(d)
    plot, own = d.rng.choice(PLOTS[d.lang])
    asked = [text.split("|") for text in d.rng.sample(own + PET_QUESTIONS[d.lang], questions)]
    turns = [[text.format(**slots), slots[right], slots[wrong]] for text, right, wrong in asked]
    turns[0][0] = f"{d.say(plot, slots)}\n{turns[0][0]}"
    question, answer, wrong = turns[-1]
    return Task("story", slots, answer, [wrong], question=question,
                history=tuple((text, reply, True) for text, reply, _ in turns[:-1]))


def wordings(intents):
    """Return the function of a skill that is held out by wording: identity and small talk."""
    def task(d):
        def sample():
            intent = d.rng.choice(intents[d.lang])
            return d.say(intent[0], {}), *intent[1:]
        question, answer, sentence = d.choose("wording", sample)
        answer = answer.format(**{key: value[d.lang] for key, value in d.persona.items()})
        return Task("wording", {}, answer, [], question=question, sentence=sentence)
    return task


def dialogue(d):
    """Two or three turns: a second question on a story, a sum that goes on, or remembering a name or a colour."""
    texts = DIALOGUE[d.lang]
    kind = d.rng.choice(("story", "plus", "remember"))
    if kind == "story":
        return story(d, questions=2)
    if kind == "plus":
        # the sum of the first turn is only context, so it is a trained one in both parts
        before = add(replace(d, part="train", hard=False))
        total, more = int(before.answer), d.rng.randint(1, 9)
        if heldout("add", max(total, more), min(total, more)) != (d.part == "heldout"):
            return dialogue(d)
        task = number_task(d, "plus", {"b": more}, total + more)
        return replace(task, question=d.say(texts["plus"], task.slots),
                       history=((d.say(ASK["add"][d.lang][:2], before.slots), before.answer, True),))
    p, c = d.choose("me", lambda: (d.rng.choice(NAMES[d.lang]), d.rng.choice(COLOURS)[d.column]))
    ask, answer = d.rng.choice((("name", p), ("colour", c)))
    slots = {"p": p, "c": c}
    history = tuple((d.say(texts[turn], slots), d.say(texts[f"{turn}_reply"], slots), False)
                    for turn in ("hello", "more"))
    return Task("remember", slots, answer, [], question=d.say(texts[ask], {}), history=history)


KNOWN = {"definition": (DEFINITIONS, tell_definition), "translate": (DICTIONARY, tell_translation),
         "fact": (FACTS, tell_fact)}
SKILLS = {"story": story, "add": add, "subtract": subtract, "next": following, "compare": compare, "count": count,
          "sort": sort, "reverse": strings("reverse", (3, 4), (5, 6)), "letter": strings("letter", (3, 4), (5, 6)),
          "repeat": strings("repeat", (2, 3), (4, 5)), "join": strings("join", (3, 4), (5, 6)),
          **{skill: known(skill, *entry) for skill, entry in KNOWN.items()},
          "identity": wordings(IDENTITY), "chat": wordings(CHAT), "dialogue": dialogue}

# ---------------------------------------------------------------------------------------------------------------------
# 5. The mix of every file, in parts of the whole; "_hard" asks for the second level.

SFT_MIX = {"story": 14, "dialogue": 12, "definition": 5, "translate": 9, "fact": 8, "add": 4, "add_hard": 2,
           "subtract": 3, "subtract_hard": 1, "next": 2, "compare": 3, "compare_hard": 1, "count": 3, "count_hard": 1,
           "sort": 2, "sort_hard": 1, "reverse": 4, "reverse_hard": 1, "letter": 4, "letter_hard": 1, "repeat": 2,
           "repeat_hard": 1, "join": 2, "join_hard": 1, "identity": 5, "chat": 5}
# who gives a persona of his own wants the model to know it: three times as many conversations are about it
PERSONA_SFT_MIX = {**SFT_MIX, "identity": 3 * SFT_MIX["identity"]}
# skills a small model masters: a reward model can see a wrong answer only where it could find the right one
PREFERENCE_MIX = {"story": 5, "compare": 2, "letter": 3, "reverse": 2, "join": 1, "repeat": 1, "count": 1, "next": 1,
                  "definition": 1, "translate": 2}
# skills whose answers stand in the question and which a model solves sometimes: some of its samples are right, some
# wrong, and what it learns from them holds for other questions (one sum teaches little about another)
RL_MIX = {"sort_hard": 12, "story": 3, "next": 2, "compare_hard": 2, "count": 2, "reverse_hard": 1}
PRETRAIN_MIX = {"story": 18, "definition": 8, "translate": 12, "fact": 9, "numbers": 13, "strings": 10, "question": 30}
QUESTION_MIX = {**SFT_MIX, "story": 0, "dialogue": 8, "chat": 0}
STATEMENT_MIX = {"numbers": dict.fromkeys(("add", "add_hard", "subtract", "subtract_hard", "next", "compare", "count",
                                           "sort"), 1),
                 "strings": dict.fromkeys(("reverse", "letter", "repeat", "join"), 1)}


def make_task(d, mix):
    """Draw a skill by its weight and a Task of it; return (skill, task with its question worded)."""
    skill = d.rng.choices(list(mix), list(mix.values()))[0]
    task = SKILLS[skill.removesuffix("_hard")](replace(d, hard=skill.endswith("_hard")))
    return skill, replace(task, question=task.question or d.say(ASK[task.form][d.lang], task.slots))


def statement(d, task):
    """Say what a Task asks, and its answer, as a plain sentence."""
    return d.say(TELL[task.form][d.lang], {**task.slots, "x": task.answer})


def polite_form(d, lang, task):
    """Return a polite answer with {x} where the answer goes: opener and sentence."""
    return d.rng.choice(POLITE_OPENERS[lang]), task.sentence or d.rng.choice(SENTENCES[lang])


# ---------------------------------------------------------------------------------------------------------------------
# 6. The rows of the four files


def deal(rng, entries):
    """Yield the entries in shuffled rounds, without end: all come equally often, which random draws do not give."""
    while True:
        yield from rng.sample(entries, len(entries))


def pretrain_lines(d, kind, decks):
    """Yield the lines of one pretraining document: without end, but for a story."""
    rng, lang = d.rng, d.lang
    if kind == "fact":
        welcome = {"en": "In the town of Willow lives {}.", "zh": "柳树镇上住着{}。"}[lang]
        while True:
            person = next(decks[lang, kind])
            if rng.random() < 0.3:
                yield welcome.format(person[d.column])
            for fact in rng.sample([fact for fact in FACTS if fact[0] is person], 4):
                yield statement(d, tell_fact(d, fact))
    elif kind in KNOWN:
        while True:
            yield statement(d, KNOWN[kind][1](d, next(decks[lang, kind])))
    elif kind in ("story", "question"):
        # a story has people of its own, so nobody else asks about it
        frame, (p, q) = rng.choice(FRAMES[lang][:1 if kind == "story" else 2]), rng.sample(NAMES[lang], 2)
        while True:
            task = story(d, questions=6) if kind == "story" else make_task(d, QUESTION_MIX)[1]
            turns = [(question, answer) for question, answer, _ in task.history] + [(task.question, task.answer)]
            for question, answer in turns:
                answer = rng.choice((answer, polite_form(d, lang, task)[1].format(x=answer)))
                yield frame.format(p=p, q=q, question=question, answer=answer)
            if kind == "story":
                return
    counting = rng.random() < 0.15
    while kind == "numbers" and counting:
        start = rng.randint(1, 88)
        yield d.row(range(start, start + rng.randint(6, 12))) + {"en": ".", "zh": "。"}[lang]
    while kind in STATEMENT_MIX:
        yield statement(d, make_task(d, STATEMENT_MIX[kind])[1])


def pretrain_row(d, decks):
    """Return one pretraining row: a story with questions, or sentences until the document is long enough."""
    kind = d.rng.choices(list(PRETRAIN_MIX), list(PRETRAIN_MIX.values()))[0]
    glue = "\n" if kind in ("story", "question") or d.lang == "zh" else " "
    enough = d.rng.randint(110, 330 if d.lang == "en" else 200)
    text = ""
    for line in pretrain_lines(d, kind, decks):
        text += glue + line if text else line
        if len(text) >= enough and kind != "story":
            break
    return {"text": text, "lang": d.lang, "skill": kind}


def sft_row(d):
    """Return one conversation; without a system prompt the style is a coin toss, with one it does as it says."""
    rng, lang = d.rng, d.lang
    skill, task = make_task(replace(d, turns=3), SFT_MIX if d.persona == PERSONA else PERSONA_SFT_MIX)
    style, answer_lang, turns = rng.choice(("curt", "polite")), lang, []
    if rng.random() < 0.2:
        rule = style
        if task.check == "number" and not task.history and rng.random() < 0.3:
            # digits are the same in both languages, so only the sentence around them changes
            rule, style, answer_lang = "other", "polite", LANGS[1 - d.column]
        turns.append(("system", rng.choice(SYSTEM[rule][lang])))

    def styled(answer):
        return "".join(polite_form(d, answer_lang, task)).format(x=answer) if style == "polite" else answer
    for user, reply, follows_style in task.history:
        turns += [("user", user), ("assistant", styled(reply) if follows_style else reply)]
    turns += [("user", task.question), ("assistant", styled(task.answer))]
    return {"conversations": [{"role": role, "content": content} for role, content in turns], "lang": lang,
            "skill": skill, "answer": task.answer, "check": task.check}


def preference_row(d, kind):
    """Return a pair whose sides differ in one thing only, the kind."""
    skill, task = make_task(d, PREFERENCE_MIX)
    opener, sentence = polite_form(d, d.lang, task)
    space = {"en": " ", "zh": ""}[d.lang]
    chosen = opener + sentence.format(x=task.answer)
    rejected = {"wrong": opener + sentence.format(x=d.rng.choice(task.wrong)),
                "curt": task.answer,
                "impolite": d.rng.choice(RUDE[d.lang]) + space + sentence.format(x=task.answer),
                "rambling": space.join([chosen, *d.rng.sample(OFF_TOPIC[d.lang], 3)])}[kind]
    return {"prompt": task.question, "chosen": chosen, "rejected": rejected, "lang": d.lang, "skill": skill,
            "kind": kind, "answer": task.answer, "check": task.check}


def rl_row(d):
    """Return a prompt with a checkable answer."""
    skill, task = make_task(d, RL_MIX)
    return {"conversations": [{"role": "user", "content": task.question}], "lang": d.lang, "skill": skill,
            "answer": task.answer, "check": task.check}


def rows_of(stage, part, size, seed, persona):
    """Yield (row, its JSON line) for one file; size is in bytes of text for "pretrain", in rows for the others.

    Every file has its own stream of random numbers, so the size of one does not change another. A row that was there
    before is drawn again, a few times: small skills (facts) may repeat in the long run, documents do not.
    """
    rng = random.Random(f"{seed} {stage} {part}")
    decks = {(lang, skill): deal(rng, PEOPLE if skill == "fact" else entries)
             for lang in LANGS for skill, (entries, _) in KNOWN.items()}
    written, seen = Counter(), set()
    make = {"pretrain": lambda d: pretrain_row(d, decks), "sft": sft_row, "rl": rl_row,
            "preference": lambda d: preference_row(d, KINDS[written[d.lang] % len(KINDS)])}[stage]
    while written.total() < size:
        lang = min(LANGS, key=lambda lang: written[lang])  # the one that is behind: equal citizens
        for _ in range(50):
            row = make(Draw(rng, lang, part, persona))
            line = json.dumps(row, ensure_ascii=False)
            if line not in seen:
                break
        seen.add(line)
        written[lang] += len(row["text"].encode()) if stage == "pretrain" else 1
        yield row, line


# ---------------------------------------------------------------------------------------------------------------------
# 7. The command


def words_apart(text, characters=False):
    """Cut before every Chinese word (greedy, longest word first) or before every Chinese character, and between digits.
    """
    words = "|".join(() if characters else CHINESE_WORDS) or "(?!)"
    # a blank and a newline, because the split pattern would glue a blank alone to the word behind it, and a newline
    # alone to the punctuation before it
    pattern = rf"({words}|[^a-zA-Z])((?=[\u4e00-\u9fff]|(?<=\d)\d))?"
    return re.sub(pattern, lambda found: found[1] if found[2] is None else found[1] + " \n", text)


def read_persona(path):
    """Return the embedded persona, with the fields of a JSON file put in.

    A field is a text for both languages or {"en": text, "zh": text}. Raises ValueError for anything else.
    """
    given = {}
    if path:
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"--persona {path}: {error}; the file must hold one JSON object; correct it") from None
    if not isinstance(given, dict):
        given = {"": given}
    given = {key: dict.fromkeys(LANGS, value) if isinstance(value, str) else value for key, value in given.items()}
    for key, value in given.items():
        texts = [value.get(lang) for lang in LANGS] if isinstance(value, dict) else [None]
        # half of a surrogate pair is no text: no file could be written with it
        if key not in PERSONA or not all(isinstance(text, str) and re.fullmatch("[^\ud800-\udfff]+", text)
                                         for text in texts):
            raise ValueError(f"--persona {path}: field {key!r} is {value!r}; the fields are {', '.join(PERSONA)}, each "
                             'a text or {"en": text, "zh": text}; correct the field')
    return {**PERSONA, **given}


def parse_args(argv=None):
    """Return the flags."""
    parser = cli.Parser(__doc__)
    above_zero = cli.positive(int)
    parser.add_argument("--output", default="out/data", help="folder for the files")
    parser.add_argument("--pretrain_mb", type=cli.positive(float), default=16, help="pretraining text in MB")
    parser.add_argument("--sft_samples", type=above_zero, default=24000, help="conversations to train on")
    parser.add_argument("--preference_pairs", type=above_zero, default=20000, help="pairs to train on")
    parser.add_argument("--rl_prompts", type=above_zero, default=10000, help="prompts to train on")
    parser.add_argument("--seed", type=int, default=42, help="same seed, same bytes")
    parser.add_argument("--persona", default="", help='JSON file {"name", "maker", "traits"} for another character, '
                        "of which more conversations are about")
    return parser.parse_args(argv)


def print_report(report):
    """Print rows and bytes of every file, and the rows of every skill and language."""
    for name, facts in report.items():
        print(f"\n{name:26}{facts['rows']:8} rows {facts['bytes'] / 1e6:8.2f} MB")
        cells = [f"{skill} {'+'.join(str(facts['skills'][skill, lang]) for lang in LANGS)}"
                 for skill in sorted({skill for skill, _ in facts["skills"]})]
        for start in range(0, len(cells), 5):
            print("    " + "".join(f"{cell:23}" for cell in cells[start:start + 5]))
    print("\n(skill: rows in English + rows in Chinese)")


def write_rows(path, rows, budget, for_tokenizer, bar):
    """Write (row, line) pairs to a file; the text of the first `budget` bytes goes, cut into words, to for_tokenizer.

    Returns {"rows", "bytes", "skills"}.
    """
    skills = Counter()
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row, line in rows:
            bar.update(file.write(line + "\n"))
            skills[row["skill"], row["lang"]] += 1
            if budget > 0:
                text = row.get("text") or " \n".join(f"{turn['role']} \n{turn['content']}"
                                                     for turn in row["conversations"])
                text = words_apart(text, characters=skills.total() % 4 == 0)
                for_tokenizer.append(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                budget -= len(text.encode())
    return {"rows": skills.total(), "bytes": path.stat().st_size, "skills": skills}


def main(args):
    """Write every file and print what they hold; return {file name: {"rows", "bytes", "skills"}}."""
    persona = read_persona(args.persona)
    sizes = {"pretrain": int(args.pretrain_mb * 1e6), "sft": args.sft_samples, "preference": args.preference_pairs,
             "rl": args.rl_prompts}
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    report, for_tokenizer = {}, []
    # characters to write, nearly: 0.85 for a byte of text, 270 for another row, and a twentieth more is held out
    expected = 1.05 * (0.85 * sizes["pretrain"] + 270 * (sum(sizes.values()) - sizes["pretrain"]))
    bar = logs.progress(int(expected), "data", unit="chr", unit_scale=True)
    for stage, size in sizes.items():
        # held-out files: enough for an error of one or two percent, small enough to be evaluated often
        for part, amount in (("train", size), ("heldout", min(size, max(1000, size // 20)))):
            name = f"{stage}.{part}.jsonl"
            # three parts of plain text and one of conversations are plenty to find every word
            budget = {"pretrain": 1.5e6, "sft": 0.5e6}.get(stage, 0) if part == "train" else 0
            rows = rows_of(stage, part, amount, args.seed, persona)
            report[name] = write_rows(output / name, rows, budget, for_tokenizer, bar)
    bar.close()
    random.Random(args.seed).shuffle(for_tokenizer)
    styles = {"polite_openers": [text.strip() for lang in LANGS for text in POLITE_OPENERS[lang]],
              "rude": [text for lang in LANGS for text in RUDE[lang]], "max_characters": MAX_CHARACTERS,
              "rule": "impolite: contains a rude text; else curt: starts with no polite opener; else rambling: longer "
                      "than max_characters; else polite"}
    (output / "tokenizer.jsonl").write_bytes("".join(for_tokenizer).encode())
    (output / "styles.json").write_bytes((json.dumps(styles, ensure_ascii=False, indent=1) + "\n").encode())
    with open(output / "sft.train.jsonl", encoding="utf-8") as file:
        print("".join(next(file) for _ in range(min(3, args.sft_samples))), end="")
    print_report(report)
    return report


if __name__ == "__main__":
    common.run(main, parse_args)
