"""Words that decide whether a full stop ends a sentence; see ``sentences``. Lower case, without the last stop.

The lists cover common abbreviations of English, German, French, Spanish, Italian, Portuguese, Dutch, the Scandinavian languages and
Russian. They were written for this package from general knowledge of these languages.
"""

from __future__ import annotations

BEFORE_NAMES = frozenset(
    "mr mrs ms mx sr dr drs prof st ste mt ft gen col sgt capt lt cmdr cpl maj adm rev hon fr sen rep gov pres supt det insp messrs mme "
    "mlle mmes sra srta dra srs don dña sig sigg dott ing dipl hr fru frl herr dhr mevr г-н г-жа ул им акад доц проф".split()
)
"""Titles: a name follows."""

BEFORE_NUMBERS = frozenset(
    "no nos nr nrs vol vols fig figs pp pg ch chap sec sect art arts eq eqs ex tab bd kap abb núm num pág págs стр рис гл табл § "
    "tel".split()
)
"""The stop belongs to the word if a number follows."""

MONTHS_SHORT = frozenset(
    "jan feb mar apr jun jul aug sep sept oct okt nov dec dez déc févr janv avr juil янв февр апр авг сент окт нояб дек".split()
)

NEVER_LAST = frozenset(
    "e.g i.e vs cf viz z.b d.h bzw bspw evtl ggf vgl sog inkl incl insb approx ca resp p.ex f.eks bl.a dvs t.ex o.a d.w.z bijv см т.е "
    "напр".split()
)
"""Abbreviations that need something after them."""

OFTEN_LAST = frozenset(
    "etc inc ltd co corp jr bros dept univ assn ave blvd rd gmbh usw ed eds est al a.m p.m op.cit ecc etcétera osv m.fl o.dgl u.s.w "
    "т.д т.п др гг вв".split()
)
"""Abbreviations that may end a sentence: a capital letter after them says so."""

SPACED = frozenset("zb dh ua uä oä so su va eg ie те pex".split())
"""Two parts of an abbreviation that is written with a space, as in ``z. B.``; something follows."""

SPACED_LAST = frozenset("тд тп".split())
"""The same of abbreviations that may end a sentence, as ``и т. д.``."""

MONTHS_AND_DAYS = (
    frozenset(
        "january february march april may june july august september october november december "
        "januar jänner februar märz mai juni juli oktober dezember janvier février mars avril juin juillet août septembre octobre novembre "
        "décembre enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre gennaio febbraio aprile maggio "
        "giugno luglio settembre ottobre dicembre januari februari maart mei augustus maj juni oktober desember joulukuuta "
        "janeiro fevereiro março maio junho julho setembro outubro dezembro monday tuesday wednesday thursday friday saturday sunday "
        "montag dienstag mittwoch donnerstag freitag samstag sonntag".split()
    )
    | MONTHS_SHORT
)

ORDINAL_LEADS = frozenset("am im der des dem den die zum zur vom beim seit ab bis vor nach jeder jedes jede jeden 's den det d de".split())
"""Words before an ordinal written as number and stop, as in ``der 2. Weltkrieg``."""

NUMBER_GOES_ON = frozenset("und oder bis sowie og och eller i a és vagy až ja tai".split())
"""Words after such an ordinal, as in ``am 3. und 4. Mai``."""

ANSWER_LEADS = frozenset(
    "is are was were be been equals equal answer option choice letter costs gets has have ist sind war lautet antwort est sont réponse "
    "es son era respuesta è sono risposta é são resposta antwoord er svar равно ответ".split()
)
"""Words before a value: a letter or a number after them is an answer, not an initial or an ordinal."""

SENTENCE_STARTS = frozenset(
    "the this that these those an he she it we they you his her its our their my your there here then next but and so if in on at for "
    "when while after before however also what who where why how is are was were do does did can could will would should yes no not now "
    "by from to of under over about between during until through may might must such more other another both first second finally ask see "
    "today later let all some many most each every since because although as with once one please "
    "der die das dies diese dieser ein eine er sie es wir ich ihr dann danach aber und denn wenn als im am heute hier dort ja nein "
    "le la les un une il elle ils elles nous vous je on puis ensuite mais et dans ce cette ces oui non "
    "el los las una él ella ellos nosotros yo luego después pero y en este esta sí "
    "lo gli uno una lui lei loro noi poi ma nel questo questa o os as um uma ele ela eles nós depois mas no na isso sim não "
    "de het een hij zij wij ik daarna maar en dit deze ja nee den det han hon vi jag sedan men och "
    "он она оно они мы вы я потом затем но и а в на это этот эта если когда да нет".split()
)
"""Capitalised after an initial or an acronym, these begin a sentence; other capitalised words are names."""
