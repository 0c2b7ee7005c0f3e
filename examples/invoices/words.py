"""The words of the invoice lines: month names, labels, sentences, currencies and noise, as plain tables."""

from typing import NamedTuple


class Language(NamedTuple):
    """The words of one language on an invoice. Only `short` months may be empty."""

    months: tuple[str, ...]
    short: tuple[str, ...]
    dates: tuple[str, ...]
    invoice: tuple[str, ...]
    due: tuple[str, ...]
    total: tuple[str, ...]
    sentences: tuple[str, ...]


class Currency(NamedTuple):
    """The ways to write one currency: signs come before or after the amount, words only after it."""

    signs: tuple[str, ...]
    words: tuple[str, ...]


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


DAY_MONTH_YEAR = ("{d} {m} {y}", "{d}. {m} {y}", "{d} {m} '{yy}", "{d}-{m}-{y}", "{dd} {m}, {y}")
OF_OF = ("{d} de {m} de {y}", "{d} de {m} {y}", "{d} {m} {y}")

LANGUAGES: dict[str, Language] = {
    "en": Language(
        months=_split("January February March April May June July August September October November December"),
        short=_split("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec"),
        dates=(
            "{d} {m} {y}",
            "{d} {m} '{yy}",
            "{m} {d}, {y}",
            "{m} {th}, {y}",
            "{m} {th} {y}",
            "{th} {m} {y}",
            "the {th} of {m} {y}",
            "{th} of {m}, {y}",
            "{d}-{m}-{y}",
            "{d}-{m}-{yy}",
            "{weekday} {d} {m} {y}",
        ),
        invoice=("Inv #", "Invoice", "Invoice no. ", "Inv", "Invoice #", "invoice number", "Inv. ", "Bill no", "Bill"),
        due=("due", "Due date", "payable by", "due on", "pay by", "due by", "Due:"),
        total=("total", "Total due", "amount", "Amount due", "to pay", "balance", "Total:"),
        sentences=(
            "Please pay {a} by {d} for invoice {i}",
            "Invoice {i} for {a} is due on {d}",
            "We still await {a} on invoice {i}, due {d}",
            "{a} must reach us before {d} (invoice {i})",
            "Your invoice {i} of {a} falls due {d}",
            "On {d} we will debit {a} for invoice {i}",
            "kindly settle inv {i} ({a}) no later than {d}",
            "by {d}: {a}, quoting invoice {i}",
        ),
    ),
    "de": Language(
        months=_split("Januar Februar März April Mai Juni Juli August September Oktober November Dezember"),
        short=_split("Jan Feb Mär Apr Mai Jun Jul Aug Sep Okt Nov Dez"),
        dates=("{d}. {m} {y}", "{dd}. {m} {y}", "{d} {m} {y}", "{d}. {m} '{yy}"),
        invoice=("Rechnung", "Rechnung Nr. ", "Rg.-Nr. ", "Rechnungsnr. ", "RNr"),
        due=("fällig am", "zahlbar bis", "fällig", "Zahlungsziel"),
        total=("Gesamt", "Betrag", "Summe", "Gesamtbetrag", "zu zahlen"),
        sentences=("Bitte überweisen Sie {a} bis {d} für Rechnung {i}", "Rechnung {i} über {a} ist am {d} fällig"),
    ),
    "fr": Language(
        months=_split("janvier février mars avril mai juin juillet août septembre octobre novembre décembre"),
        short=_split("janv. févr. mars avr. mai juin juil. août sept. oct. nov. déc."),
        dates=("{d} {m} {y}", "le {d} {m} {y}", "{d} {m} '{yy}", "{er} {m} {y}"),
        invoice=("Facture", "Facture n° ", "Facture no ", "Fact. "),
        due=("échéance", "à payer avant le", "échéance le", "payable le"),
        total=("total", "montant", "total TTC", "net à payer"),
        sentences=(
            "Merci de régler la facture {i} de {a} avant le {d}",
            "La facture {i} ({a}) arrive à échéance le {d}",
        ),
    ),
    "es": Language(
        months=_split("enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre"),
        short=_split("ene feb mar abr may jun jul ago sep oct nov dic"),
        dates=OF_OF,
        invoice=("Factura", "Factura n.º ", "Factura núm. ", "Fra. "),
        due=("vence", "vencimiento", "vence el", "pagar antes del"),
        total=("total", "importe", "total a pagar"),
        sentences=("Rogamos abonen {a} antes del {d} por la factura {i}", "La factura {i} de {a} vence el {d}"),
    ),
    "it": Language(
        months=_split("gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre dicembre"),
        short=_split("gen feb mar apr mag giu lug ago set ott nov dic"),
        dates=("{d} {m} {y}", "il {d} {m} {y}", "{d} {m} '{yy}"),
        invoice=("Fattura", "Fattura n. ", "Fatt. "),
        due=("scadenza", "scade il", "entro il"),
        total=("totale", "importo", "da pagare"),
        sentences=("Si prega di pagare {a} entro il {d} per la fattura {i}", "La fattura {i} di {a} scade il {d}"),
    ),
    "pt": Language(
        months=_split("janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro dezembro"),
        short=_split("jan fev mar abr mai jun jul ago set out nov dez"),
        dates=OF_OF,
        invoice=("Fatura", "Fatura n.º ", "Fatura nº "),
        due=("vencimento", "vence em", "pagar até"),
        total=("total", "valor", "montante"),
        sentences=("Por favor pague {a} até {d} pela fatura {i}", "A fatura {i} no valor de {a} vence em {d}"),
    ),
    "nl": Language(
        months=_split("januari februari maart april mei juni juli augustus september oktober november december"),
        short=_split("jan feb mrt apr mei jun jul aug sep okt nov dec"),
        dates=DAY_MONTH_YEAR,
        invoice=("Factuur", "Factuurnr. ", "Factuur nr "),
        due=("vervaldatum", "vervalt op", "te betalen voor"),
        total=("totaal", "bedrag", "te betalen"),
        sentences=("Gelieve {a} te betalen voor {d}, factuur {i}", "Factuur {i} van {a} vervalt op {d}"),
    ),
    "sv": Language(
        months=_split("januari februari mars april maj juni juli augusti september oktober november december"),
        short=(),
        dates=DAY_MONTH_YEAR,
        invoice=("Faktura", "Fakturanr ", "Faktura nr "),
        due=("förfaller", "förfallodatum", "betalas senast"),
        total=("summa", "att betala", "belopp"),
        sentences=("Vänligen betala {a} senast {d} för faktura {i}",),
    ),
    "da": Language(
        months=_split("januar februar marts april maj juni juli august september oktober november december"),
        short=(),
        dates=DAY_MONTH_YEAR,
        invoice=("Faktura", "Fakturanr. ", "Regning"),
        due=("forfalder", "forfaldsdato", "betales senest"),
        total=("i alt", "beløb", "at betale"),
        sentences=("Betal venligst {a} senest {d} for faktura {i}",),
    ),
    "pl": Language(
        months=_split(
            "stycznia lutego marca kwietnia maja czerwca lipca sierpnia września października listopada grudnia"
        ),
        short=(),
        dates=("{d} {m} {y}", "{d} {m} {y} r."),
        invoice=("Faktura", "Faktura nr ", "FV nr "),
        due=("termin płatności", "płatne do", "do dnia"),
        total=("razem", "kwota", "do zapłaty"),
        sentences=("Prosimy o zapłatę {a} do {d} za fakturę {i}",),
    ),
    "cs": Language(
        months=_split("ledna února března dubna května června července srpna září října listopadu prosince"),
        short=(),
        dates=("{d}. {m} {y}", "{d} {m} {y}"),
        invoice=("Faktura", "Faktura č. ", "Fakt. č. "),
        due=("splatnost", "splatná do", "zaplatit do"),
        total=("celkem", "částka", "k úhradě"),
        sentences=("Uhraďte prosím {a} do {d} za fakturu {i}",),
    ),
    "fi": Language(
        months=_split(
            "tammikuuta helmikuuta maaliskuuta huhtikuuta toukokuuta kesäkuuta heinäkuuta elokuuta "
            "syyskuuta lokakuuta marraskuuta joulukuuta"
        ),
        short=(),
        dates=("{d}. {m} {y}", "{d} {m} {y}"),
        invoice=("Lasku", "Laskun numero ", "Lasku nro "),
        due=("eräpäivä", "maksettava viimeistään"),
        total=("yhteensä", "maksettava", "summa"),
        sentences=("Laskun {i} summa {a} erääntyy {d}",),
    ),
}

CURRENCIES: dict[str, Currency] = {
    "USD": Currency(("$", "US$", "USD"), ("dollars", "US dollars")),
    "EUR": Currency(("€", "EUR"), ("euros", "euro", "Euro")),
    "GBP": Currency(("£", "GBP"), ("pounds", "pounds sterling")),
    "CHF": Currency(("CHF", "Fr.", "SFr."), ("Swiss francs", "Franken")),
    "JPY": Currency(("¥", "JPY"), ("yen",)),
    "SEK": Currency(("SEK",), ("Swedish kronor",)),
    "NOK": Currency(("NOK",), ("Norwegian kroner",)),
    "DKK": Currency(("DKK",), ("Danish kroner",)),
    "PLN": Currency(("PLN", "zł"), ("zloty", "złotych")),
    "CZK": Currency(("CZK", "Kč"), ("Czech koruna", "korun")),
    "INR": Currency(("INR", "₹", "Rs"), ("rupees",)),
    "AUD": Currency(("AUD", "A$", "AU$"), ("Australian dollars",)),
    "CAD": Currency(("CAD", "C$", "CA$"), ("Canadian dollars",)),
    "BRL": Currency(("BRL", "R$"), ("reais",)),
    "MXN": Currency(("MXN", "MX$"), ("Mexican pesos",)),
    "KRW": Currency(("KRW", "₩"), ("won",)),
}
WHOLE_UNITS = frozenset({"JPY", "KRW"})

NOISE = (
    "REMINDER", "URGENT", "Fwd:", "Re:", "copy", "second notice", "please see attached", "thanks!", "ACME Ltd",
    "Müller GmbH", "Dupont SARL", "Nordwind AB", "Rossi S.p.A.", "k.r.", "hi,", "FYI", "paid?", "scan attached",
    "Blue Harbour Inc.", "office supplies", "consulting", "hosting", "(final)", "*** overdue ***", "Dear Sir or Madam",
)  # fmt: skip
# Each `#` becomes a digit, each `@` a capital letter.
NUMBER_NOISE = (
    "PO #####", "PO-####-##", "P.O. ######", "order ####", "Order no. #######", "tel +## ## #######",
    "Tel. ### ### ####", "phone (###) ###-####", "fax 0## #######", "customer ####", "Kd-Nr. #####",
    "VAT ID @@#########", "VAT ##%", "qty ##",
    "page # of #", "net ## days", "## items", "acct ####-####", "IBAN ..####", "room ###", "ticket @@-####", "# pcs",
)  # fmt: skip
EARLIER_DATES = ("issued", "ordered", "shipped", "dated", "delivered", "printed on")
PARTIAL_AMOUNTS = ("subtotal", "VAT", "shipping", "deposit paid", "net", "discount")
