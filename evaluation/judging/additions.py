"""English sentences that make a note wrong when added: rare findings, and sentences typical of notes."""

# (sentence, words of its topic as regular expressions). A sentence is used only if no word of the visit starts with one
# of these.
INVENTED = {
    "S": [
        ("There has also been blood in the stool for the past week.", "stool bowel rectal hemato melena gastro colon"),
        ("There have been two fainting spells in the last month.", "faint syncop conscious collaps dizz"),
        ("A severe allergic reaction to penicillin occurred in the past.", "allerg penicillin anaphyla amoxicillin"),
        ("Sudden double vision began yesterday.", "vision visual diplop eye sight ocular"),
        ("Unintended weight loss of 8 kg over two months is also reported.", "weight kg loss obes cachex"),
        ("There is new hearing loss in one ear.", "hear ear deaf audio"),
    ],
    "O": [
        ("A harsh systolic murmur is heard over the aortic area.", "murmur cardi heart aort valv auscult echo"),
        ("There is pitting edema of both lower legs.", "edema oedema swell leg"),
        ("A purpuric rash covers both forearms.", "rash purpur skin petech derm"),
        ("The spleen is palpable 4 cm below the costal margin.", "spleen splen abdom hepat"),
        ("Coarse crackles are heard at both lung bases.", "lung crackl breath pulmon respirat chest auscult thora"),
        ("There is marked neck stiffness.", "neck nuchal mening cervical"),
    ],
    "A": [
        ("Newly diagnosed type 2 diabetes is also present.", "diabet gluc hba1c insulin sugar metformin"),
        ("There is an additional deep vein thrombosis.", "thromb dvt anticoag embol heparin warfarin clot"),
        ("Active pulmonary tuberculosis is a second diagnosis.", "tubercul tb cough lung"),
        ("Iron deficiency anemia is also present.", "anemi anaemi iron hemoglobin haemoglobin ferritin"),
        ("There is concurrent alcohol withdrawal.", "alcohol drink withdraw liver"),
        ("A major depressive episode was also diagnosed.", "depress mood psych suicid anxi"),
    ],
    "P": [
        ("Start warfarin with a target INR of 2 to 3.", "warfarin anticoag inr thromb heparin embol stroke fibrill"),
        ("Start insulin glargine 10 units at bedtime.", "insulin diabet gluc sugar"),
        ("Coronary angiography will be performed this week.", "coron angiogr card heart myocard chest"),
        ("A lumbar puncture will be done tomorrow.", "lumbar spinal csf mening neuro puncture"),
        ("Transfuse two units of packed red cells today.", "transfus blood hemoglobin anemi haemoglobin bleed"),
        ("Start isoniazid for latent tuberculosis.", "isoniazid tubercul tb"),
    ],
}

# Findings, assessments and plans that notes often have, as above.
USUAL = {
    "S": [
        ("There are no known drug allergies.", "allerg anaphyl intoleran hives"),
        ("The patient does not smoke or drink alcohol.", "smok tobacco cigar nicotin vap pack alcohol drink beer wine"),
        (
            "There is no family history of similar problems.",
            r"famil mother father sister brother sibling mom dad parent "
            r"genetic heredit relative cousin aunt uncle grand son\b daughter consangu",
        ),
        ("Appetite and sleep are normal.", "appetite eat ate food feed fed nutri sleep slept insomn anorex"),
        ("Vaccinations are up to date.", "vaccin immuni shot booster"),
        (
            "The patient is retired.",
            "retire work job employ occupation school student year-old infant child baby boy girl",
        ),
        ("The symptoms began gradually.", "gradual sudden abrupt onset start began begin acute slow progress first"),
    ],
    "O": [
        (
            "Vital signs are stable.",
            r"vital pressure bp\b pulse heart temperature fever febrile hemodynam stable saturat "
            r"respirat oxygen",
        ),
        (
            "The patient is alert and oriented.",
            "alert orient conscious mental awake confus glasgow gcs cognit neuro coma lethar drows",
        ),
        ("Heart sounds are normal, without murmurs.", r"heart cardi murmur auscult ecg\b ekg\b echo chest"),
        ("The lungs are clear on auscultation.", "lung breath chest auscult respir pulmon cough pneum thora bronch"),
        ("The abdomen is soft and not tender.", "abdom belly stomach gastr bowel liver hepat tender pelvi"),
        ("Gait is normal.", "gait walk ambul leg limp neuro foot knee hip motor"),
        ("The complete blood count is normal.", "blood count cbc hemoglobin leuko white platelet anemi lab hemat"),
    ],
    "A": [
        ("The prognosis is good with treatment.", "prognos outlook outcome recover expect"),
        (
            "Anxiety contributes to the symptoms.",
            "anxi stress worr nerv mood depress psych panic afraid scar fear concern",
        ),
        ("The differential diagnosis includes a viral infection.", "differential virus viral infect"),
        ("Obesity is a risk factor.", r"obes weight bmi\b overweight fat\b"),
        ("Blood pressure is well controlled.", r"hypertens hypotens pressure bp\b"),
        ("The condition has improved since the last visit.", "improv better wors progress stable last previous resol"),
        ("Poor adherence to treatment contributes.", "adher complian miss forg skip stop regularly"),
    ],
    "P": [
        ("Refer to physical therapy.", "physical physio therap rehab exercis mobil"),
        ("Smoking cessation counseling was given.", "smok tobacco cigar nicotin vap"),
        (
            "Advise a balanced diet and regular exercise.",
            "diet eat food nutri exercis activ lifestyle weight salt meal",
        ),
        ("The patient was educated on the side effects of the medication.", "educat side adverse effect explain teach"),
        ("Follow up in two weeks.", "follow week return visit appoint check recheck review back again"),
        (
            "Take acetaminophen as needed for pain.",
            "acetaminophen paracetamol tylenol pain ache analges nsaid hurt sore",
        ),
        ("Drink plenty of fluids and rest.", "fluid hydrat water rest drink"),
        ("Offer psychological support.", "psych counsel support mental emotion anxi depress stress"),
        ("Repeat the blood tests at the next visit.", "blood lab test repeat recheck"),
    ],
}
