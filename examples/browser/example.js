/** A text to try the page with, and questions that share few words with their answers. */

export const QUERIES = [
  "the cat is not eating",
  "late train home",
  "trash collection",
  "where can I buy food?",
  "how do I get warm?",
];

export const EXAMPLE = `These notes are for whoever stays in the house while we are away.

The key with the blue tag opens the front door, the small brass one is for the shed. If you lock yourself out, Marta in number 9 has a spare set and is nearly always at home before noon.

The boiler stands in the cupboard under the stairs. If the radiators stay lukewarm, turn the black valve a quarter to the left and wait for ten minutes. Extra blankets are in the chest at the foot of the bed. The stove in the sitting room burns dry beech only, and the flue must be open before you light it.

Wi-Fi reaches every room but the attic. When the connection drops, unplug the white box next to the telephone, count to twenty, and plug it in again. The password is on a card inside the kitchen cupboard.

Glass and paper are collected on alternate Tuesdays, everything else on Friday morning. Put the bins at the kerb the evening before, with the lids closed, because of the foxes. Kitchen scraps go on the heap behind the shed.

Olive, the cat, eats twice a day and pretends that she has not. Should she refuse her food or hide for more than a day, call Dr Lindqvist on the harbour road, who knows her well. She is not allowed on the roof, whatever she tells you.

Tomatoes in the greenhouse want water every evening, the roses only when it has been dry for a week. Please pick whatever is ripe. The lawn can wait until we are back.

The washing machine must not be filled more than half, or it walks across the floor. Its filter is behind the little door at the bottom. Hang linen on the line in the garden; the dryer has been broken since spring.

Bread is best from the bakery at the bridge, which sells out by ten. On Saturdays there is a market in the square, with cheese from the hills and an old man who sharpens knives. The nearest pharmacy is open on Sundays too.

The last bus up the hill leaves the station at 23:10. After that you can ring for a taxi, which takes a quarter of an hour, or walk along the river in forty minutes. The path is lit as far as the mill.

If it pours, the museum of clocks has a room where small visitors may take things apart. Board games are on the lower shelf, and the projector works if you are patient with it. From the beach you can see seals at low tide, most often in the morning.

Should the lights go out, the fuses are behind the mirror in the hall. There are candles in the drawer below. In an emergency dial 112, and give the address as Upper Mill Lane 7.

Leave the key under the third flowerpot when you go.
`;
